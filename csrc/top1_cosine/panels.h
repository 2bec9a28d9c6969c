// Screening on panels of codes, sixteen rows side by side, written once over a vector type V and lines of codes L.
// A group of rows is given up after the first panel that shows that none of them can reach its floor.
//
// L: Sum, sixteen int32; load(codes) of 16 rows × 4 columns; square(sum, line) adds each row's four squares;
// add(sum, line, word) each row's products with four query codes; store(out, sum, bias).
#pragma once

#include "simd/unroll.h"
#include "top1_cosine/body.h"

namespace {

using amg::kGroup;
using amg::PanelScan;

constexpr std::int64_t kLine = 4 * kGroup;  // bytes

// What bounds need of a group's rows.
struct GroupRows {
  alignas(64) float scales[kGroup], errors[kGroup], norms[kGroup];
  unsigned present;  // a bit a row
};

template <class V>
GroupRows load_group(const PanelScan& s, std::int64_t group) {
  GroupRows rows;
  const std::int64_t first = group * kGroup, left = s.count - first;
  rows.present = left >= kGroup ? (1u << kGroup) - 1 : (1u << left) - 1;
  for (int lane = 0; lane < kGroup; lane += V::width) {
    const auto scale = V::load(s.scales + first + lane), relative = V::set(1 + 1e-6f);
    V::store(rows.scales + lane, scale);
    V::store(rows.errors + lane, V::fma(V::load(s.errors + first + lane), relative, V::set(1e-30f)));
    const auto length = V::sqrt(V::convert(s.squares + first + lane));
    V::store(rows.norms + lane, V::mul(V::mul(scale, length), relative));
  }
  return rows;
}

// Upper bounds on what is left of the rows' norms beyond the columns whose squares these are.
template <class V>
void rests_of(const PanelScan& s, std::int64_t group, const GroupRows& rows, const std::int32_t* squares, float* rests) {
  std::int32_t left[kGroup];
  for (int lane = 0; lane < kGroup; ++lane) left[lane] = s.squares[group * kGroup + lane] - squares[lane];
  for (int lane = 0; lane < kGroup; lane += V::width)
    V::store(rests + lane, V::mul(V::load(rows.scales + lane), V::sqrt(V::convert(left + lane))));
}

// The rows, a bit each, whose bound on the similarity is not below the query's floor. rests: null, or what is left of
// the rows' norms, `tail` being what is left of the query's.
template <class V>
unsigned reaching(const PanelScan& s, const GroupRows& rows, std::int64_t query, const std::int32_t* dots, const float* rests,
                  float tail, const Screen& screen) {
  const auto query_scale = V::set(s.query_scales[query]), query_error = V::set(s.query_errors[query]);
  const auto floor = V::set(screen.floors[query]);
  unsigned passed = 0;
  for (int lane = 0; lane < kGroup; lane += V::width) {
    const auto score = V::mul(V::convert(dots + lane), V::mul(V::load(rows.scales + lane), query_scale));
    auto bound = V::add(score, V::fma(V::load(rows.norms + lane), query_error, V::load(rows.errors + lane)));
    if (rests != nullptr) bound = V::fma(V::load(rests + lane), V::set(tail), bound);
    passed |= V::not_below(bound, floor) << lane;
  }
  return passed & rows.present;
}

// Codes are asked for this many groups early, into the second cache only: the panels are too many streams for the
// hardware's prefetcher, and their lines would throw each other out of the first cache.
constexpr std::int64_t kGroupsAhead = 2;

// The products of R groups, one after the other, with Q queries in the columns of a panel, and the rows' squares.
template <class L, int R, int Q, bool Squares>
AMG_INLINE inline void add_panel(const PanelScan& s, std::int64_t group, std::int64_t panel, std::int64_t first_query,
                                 typename L::Sum (&dots)[R * Q], typename L::Sum& squares) {
  const std::int64_t group_bytes = s.words * kLine;
  const std::int8_t* codes = s.codes + (panel * s.groups + group) * group_bytes;
  const std::int8_t* queries = s.query_codes + first_query * s.padded + panel * s.words * 4;
#pragma GCC unroll 4
  for (std::int64_t word = 0; word < s.words; ++word) {
    std::int32_t four[Q];
    unroll<Q>([&](auto q) AMG_INLINE { std::memcpy(four + q.value, queries + q.value * s.padded + 4 * word, 4); });
    unroll<R>([&](auto r) AMG_INLINE {
      const std::int8_t* at = codes + r.value * group_bytes + word * kLine;
      __builtin_prefetch(at + kGroupsAhead * group_bytes, 0, 1);
      const auto line = L::load(at);
      if (Squares) L::square(squares, line);
      unroll<Q>([&](auto q) AMG_INLINE { L::add(dots[r.value * Q + q.value], line, four[q.value]); });
    });
  }
}

// Sums as functions take them that are not inlined: what has its address taken would live in memory, line after line.
template <class L, int Count>
struct Kept {
  typename L::Sum sums[Count];
};

template <class L, int Count>
AMG_INLINE inline Kept<L, Count> kept(const typename L::Sum (&sums)[Count]) {
  Kept<L, Count> copy;
  unroll<Count>([&](auto i) AMG_INLINE { copy.sums[i.value] = sums[i.value]; });
  return copy;
}

// Whether, of the group's rows, one may reach a query's floor, all columns beyond the panel being as good as can be.
template <class V, class L, int Q>
[[gnu::noinline]] bool any_reaches(const PanelScan& s, std::int64_t group, std::int64_t panel, std::int64_t first_query,
                                   const Kept<L, Q>& dots, typename L::Sum squares, const Screen& screen) {
  const GroupRows rows = load_group<V>(s, group);
  alignas(64) std::int32_t values[kGroup];
  alignas(64) float rests[kGroup];
  L::store(values, squares, 0);
  rests_of<V>(s, group, rows, values, rests);
  for (int q = 0; q < Q; ++q) {
    const std::int64_t query = first_query + q, at = query * s.panels + panel;
    L::store(values, dots.sums[q], s.query_biases[at]);
    if (reaching<V>(s, rows, query, values, rests, s.query_tails[at], screen) != 0) return true;
  }
  return false;
}

template <class V, class L, int R, int Q>
[[gnu::noinline]] void offer_groups(const PanelScan& s, std::int64_t first_group, std::int64_t first_query,
                                    const Kept<L, R * Q>& dots, const Screen& screen) {
  alignas(64) std::int32_t values[kGroup];
  for (int i = 0; i < R * Q; ++i) {
    const std::int64_t group = first_group + i / Q, query = first_query + i % Q;
    const GroupRows rows = load_group<V>(s, group);
    L::store(values, dots.sums[i], s.query_biases[(query + 1) * s.panels - 1]);
    const unsigned passed = reaching<V>(s, rows, query, values, nullptr, 0, screen);
    for (int lane = 0; passed >> lane != 0; ++lane)
      if ((passed >> lane) & 1) {
        const float score = static_cast<float>(values[lane]) * (rows.scales[lane] * s.query_scales[query]);
        screen_score(screen, query, group * kGroup + lane, score, rows.errors[lane] + rows.norms[lane] * s.query_errors[query]);
      }
  }
}

// Q queries against a group; asks after panel `first_asked` and each later one whether to go on. Returns the panel after
// which the group was given up, or the number of panels.
template <class V, class L, int Q>
std::int64_t asking_tile(const PanelScan& s, std::int64_t group, std::int64_t first_query, std::int64_t first_asked,
                         const Screen& screen) {
  typename L::Sum dots[Q], squares = L::zero();
  unroll<Q>([&](auto q) AMG_INLINE { dots[q.value] = L::zero(); });
  for (std::int64_t panel = 0; panel < s.panels; ++panel) {
    add_panel<L, 1, Q, true>(s, group, panel, first_query, dots, squares);
    if (panel >= first_asked && panel + 1 < s.panels &&
        !any_reaches<V, L, Q>(s, group, panel, first_query, kept<L, Q>(dots), squares, screen))
      return panel;
  }
  offer_groups<V, L, 1, Q>(s, group, first_query, kept<L, Q>(dots), screen);
  return s.panels;
}

// Q queries against R groups, all their columns.
template <class V, class L, int R, int Q>
void whole_tile(const PanelScan& s, std::int64_t group, std::int64_t first_query, const Screen& screen) {
  typename L::Sum dots[R * Q], unused = L::zero();
  unroll<R * Q>([&](auto i) AMG_INLINE { dots[i.value] = L::zero(); });
  for (std::int64_t panel = 0; panel < s.panels; ++panel) add_panel<L, R, Q, false>(s, group, panel, first_query, dots, unused);
  offer_groups<V, L, R, Q>(s, group, first_query, kept<L, R * Q>(dots), screen);
}

// From which panel on asking pays: a few groups, the tries, ask after every panel; the others from the lowest panel on
// after which one of the last tries was given up, and never where none was.
struct Pace {
  std::int64_t panels, first = 0, lowest = panels;
  int tries = 0;

  static bool tries_group(std::int64_t number) { return number < 4 || number % 64 == 0; }

  void note(std::int64_t given_up) {
    lowest = given_up < lowest ? given_up : lowest;
    if (++tries < 4) return;
    first = lowest;
    lowest = panels;
    tries = 0;
  }
};

// body(Index<Q>{}, query) for tiles of Q queries that cover them all.
template <class L, class Body>
AMG_INLINE inline void for_queries(std::int64_t queries, Body&& body) {
  std::int64_t query = 0;
  for (; query + L::tile <= queries; query += L::tile) body(Index<L::tile>{}, query);
  if constexpr (L::tile > 4)
    for (; query + 4 <= queries; query += 4) body(Index<4>{}, query);
  if constexpr (L::tile > 2)
    for (; query + 2 <= queries; query += 2) body(Index<2>{}, query);
  for (; query < queries; ++query) body(Index<1>{}, query);
}

template <class V, class L>
std::int64_t scan_asking(const PanelScan& s, std::int64_t group, std::int64_t first_asked, const Screen& screen) {
  std::int64_t lowest = s.panels;
  for_queries<L>(s.queries, [&](auto tile, std::int64_t query) {
    const std::int64_t given_up = asking_tile<V, L, decltype(tile)::value>(s, group, query, first_asked, screen);
    lowest = given_up < lowest ? given_up : lowest;
  });
  return lowest;
}

template <class V, class L, int R>
void scan_whole(const PanelScan& s, std::int64_t group, const Screen& screen) {
  for_queries<L>(s.queries, [&](auto tile, std::int64_t query) {
    whole_tile<V, L, R, decltype(tile)::value>(s, group, query, screen);
  });
}

// A share of the rows ends where a group does.
inline std::int64_t last_group(const PanelScan& s, std::int64_t end) {
  return end == s.count ? (end + kGroup - 1) / kGroup : end / kGroup;
}

template <class V, class L>
void scan_panels(const PanelScan& s, std::int64_t begin, std::int64_t end, const Screen& screen) {
  Pace pace{s.panels};
  const std::int64_t first = begin / kGroup, last = last_group(s, end);
  for (std::int64_t group = first, step; group < last; group += step) {
    const std::int64_t number = group - first;
    if (number % 16 == 0) amg::share_floors(screen);
    step = 1;
    if (Pace::tries_group(number)) {
      pace.note(scan_asking<V, L>(s, group, 0, screen));
    } else if (pace.first + 1 < s.panels) {
      scan_asking<V, L>(s, group, pace.first, screen);
    } else if (number % L::groups == 0 && group + L::groups <= last) {
      scan_whole<V, L, L::groups>(s, group, screen);
      step = L::groups;
    } else {
      scan_whole<V, L, 1>(s, group, screen);
    }
  }
}

// The row of [begin, end) that the first panel tells to be the closest to each query: no bound, a guess.
template <class V, class L>
void guess_rows(const PanelScan& s, std::int64_t begin, std::int64_t end, float* scores, std::int64_t* rows) {
  const std::int64_t last = last_group(s, end);
  alignas(64) std::int32_t values[kGroup];
  for (std::int64_t group = begin / kGroup; group < last; ++group)
    for (std::int64_t query = 0; query < s.queries; ++query) {
      typename L::Sum dots[1] = {L::zero()}, unused = L::zero();
      add_panel<L, 1, 1, false>(s, group, 0, query, dots, unused);
      L::store(values, dots[0], s.query_biases[query * s.panels]);
      unsigned better = 0;
      for (int lane = 0; lane < kGroup; lane += V::width) {
        const auto score = V::mul(V::convert(values + lane), V::load(s.scales + group * kGroup + lane));
        better |= V::not_below(score, V::set(scores[query])) << lane;
      }
      for (int lane = 0; better >> lane != 0; ++lane) {
        const std::int64_t row = group * kGroup + lane;
        if (((better >> lane) & 1) == 0 || row >= s.count) continue;
        const float score = static_cast<float>(values[lane]) * s.scales[row];
        if (score < scores[query]) continue;
        scores[query] = score;
        rows[query] = row;
      }
    }
}

template <class V, class L>
CosineKernels with_panels(CosineKernels kernels) {
  kernels.scan_panels = scan_panels<V, L>;
  kernels.guess_rows = guess_rows<V, L>;
  return kernels;
}

}  // namespace
