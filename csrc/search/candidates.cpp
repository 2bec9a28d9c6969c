#include "search/candidates.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "search/offer.h"
#include "search/threads.h"

namespace amg {

constexpr std::int64_t kRowsPerThread = 256;  // fewer are not worth another thread

Candidates::Candidates(std::int64_t k, float floor, ExactScore exact)
    : k_(k), capacity_(static_cast<std::size_t>(std::max<std::int64_t>(4 * k, 256))), exact_(std::move(exact)), floor_(floor) {
  entries_.reserve(capacity_);  // so that screening threads never allocate
  best_lowers_.reserve(k);
}

void Candidates::fail() {
  failed_ = true;
  floor_ = std::numeric_limits<float>::infinity();
  entries_.clear();
}

float Candidates::offer(std::int64_t row, float score, float slack) {
  if (!(score - slack <= score + slack)) fail();  // NaN, or an infinity that makes one
  if (failed_) return floor_;
  entries_.push_back({row, score - slack, score + slack});
  raise_floor(score - slack);
  if (entries_.size() >= capacity_) {
    drop_below_floor();
    if (entries_.size() > capacity_ / 2) rescore();
  }
  return floor_;
}

void Candidates::raise_floor(float lower) {
  const std::greater<float> smallest_on_top;
  if (static_cast<std::int64_t>(best_lowers_.size()) < k_) {
    best_lowers_.push_back(lower);
    std::push_heap(best_lowers_.begin(), best_lowers_.end(), smallest_on_top);
  } else if (lower > best_lowers_.front()) {
    std::pop_heap(best_lowers_.begin(), best_lowers_.end(), smallest_on_top);
    best_lowers_.back() = lower;
    std::push_heap(best_lowers_.begin(), best_lowers_.end(), smallest_on_top);
  }
  if (static_cast<std::int64_t>(best_lowers_.size()) == k_) floor_ = std::max(floor_, best_lowers_.front());
}

void Candidates::drop_below_floor() {
  const auto below = [this](const Candidate& entry) { return entry.upper < floor_; };
  entries_.erase(std::remove_if(entries_.begin(), entries_.end(), below), entries_.end());
}

void Candidates::rescore() {
  for (Candidate& entry : entries_)
    if (entry.lower != entry.upper) {
      entry.lower = entry.upper = exact_(entry.row);
      if (!std::isfinite(entry.upper)) return fail();
    }
  const auto better = [](const Candidate& a, const Candidate& b) {
    return a.upper != b.upper ? a.upper > b.upper : a.row < b.row;
  };
  const std::size_t keep = std::min(entries_.size(), static_cast<std::size_t>(k_));
  std::partial_sort(entries_.begin(), entries_.begin() + keep, entries_.end(), better);
  entries_.resize(keep);
  best_lowers_.clear();
  for (const Candidate& entry : entries_) raise_floor(entry.lower);
}

void Candidates::absorb(const Candidates& other) {
  if (failed_ || other.failed_) return fail();
  entries_.insert(entries_.end(), other.entries_.begin(), other.entries_.end());
  for (const Candidate& entry : other.entries_) raise_floor(entry.lower);
}

const std::vector<Candidate>* Candidates::settle() {
  drop_below_floor();
  rescore();
  drop_below_floor();
  return failed_ ? nullptr : &entries_;
}

std::vector<float> open_floors(const std::vector<bool>& usable) {
  std::vector<float> floors;
  for (const bool open : usable)
    floors.push_back(open ? -std::numeric_limits<float>::infinity() : std::numeric_limits<float>::quiet_NaN());
  return floors;
}

static CandidateTable make_table(const std::vector<float>& floors, std::int64_t k, std::atomic<float>* shared,
                                 const std::function<float(std::int64_t query, std::int64_t row)>& exact) {
  const std::int64_t queries = static_cast<std::int64_t>(floors.size());
  CandidateTable table;
  table.shared = shared;
  table.sets.reserve(queries);
  for (std::int64_t query = 0; query < queries; ++query)
    table.sets.emplace_back(k, floors[query], [&exact, query](std::int64_t row) { return exact(query, row); });
  table.floors.assign((queries + 15) / 16 * 16, std::numeric_limits<float>::infinity());
  for (std::int64_t query = 0; query < queries; ++query)
    if (std::isnan(floors[query]))
      table.sets[query].fail();
    else
      table.floors[query] = floors[query];
  return table;
}

void offer(const Screen& screen, std::int64_t query, std::int64_t row, float score, float slack) {
  const float floor = screen.table->sets[query].offer(row, score, slack);
  std::atomic<float>& shared = screen.table->shared[query];
  float highest = shared.load(std::memory_order_relaxed);
  while (highest < floor && !shared.compare_exchange_weak(highest, floor, std::memory_order_relaxed)) {
  }
  screen.table->floors[query] = std::max(floor, highest);
}

void share_floors(const Screen& screen) {
  CandidateTable& table = *screen.table;
  for (std::size_t query = 0; query < table.sets.size(); ++query)
    table.floors[query] = std::max(table.floors[query], table.shared[query].load(std::memory_order_relaxed));
}

// Merges all threads' candidates and hands over each query's best.
static void settle_tables(std::vector<CandidateTable>& tables, int num_threads,
                          const std::function<void(std::int64_t query, const std::vector<Candidate>* best)>& take) {
  std::vector<Candidates>& merged = tables.front().sets;
  const std::int64_t queries = static_cast<std::int64_t>(merged.size());
#pragma omp parallel for num_threads(num_threads)
  for (std::int64_t query = 0; query < queries; ++query) {
    for (std::size_t thread = 1; thread < tables.size(); ++thread) merged[query].absorb(tables[thread].sets[query]);
    take(query, merged[query].settle());
  }
}

void search_rows(const std::vector<float>& floors, std::int64_t count, std::int64_t k, int num_threads,
                 const std::function<float(std::int64_t query, std::int64_t row)>& exact,
                 const std::function<void(std::int64_t begin, std::int64_t end, const Screen& screen)>& screen,
                 const std::function<void(std::int64_t query, const std::vector<Candidate>* best)>& take) {
  const std::int64_t shares = std::max<std::int64_t>(1, std::min<std::int64_t>(num_threads, count / kRowsPerThread));
  std::vector<std::atomic<float>> shared(floors.size());
  for (std::atomic<float>& floor : shared) floor = -std::numeric_limits<float>::infinity();
  std::vector<CandidateTable> tables;
  for (std::int64_t share = 0; share < shares; ++share) tables.push_back(make_table(floors, k, shared.data(), exact));
#pragma omp parallel for num_threads(static_cast<int>(shares)) schedule(static, 1)
  for (std::int64_t share = 0; share < shares; ++share) {
    const Screen view{&tables[share], tables[share].floors.data()};
    screen(count * share / shares, count * (share + 1) / shares, view);
  }
  settle_tables(tables, num_threads, take);
}

}  // namespace amg
