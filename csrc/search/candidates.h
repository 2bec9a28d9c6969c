// Exact top-k from bounds: keeps every row that may be among a query's k best, re-scores exactly to decide.
#pragma once

#include <atomic>
#include <cstdint>
#include <functional>
#include <vector>

namespace amg {

// A row and bounds on its score; larger scores are closer. lower == upper once the score is exact.
struct Candidate {
  std::int64_t row;
  float lower, upper;
};

// One query's candidates. Bounded: at capacity, what the bounds cannot exclude is re-scored down to k rows.
class Candidates {
 public:
  using ExactScore = std::function<float(std::int64_t row)>;

  // Rows scored below `floor` are of no interest.
  Candidates(std::int64_t k, float floor, ExactScore exact);

  // Rejects every row from now on: no answer can be given.
  void fail();

  // Takes row's bounds score ± slack; returns the floor: rows whose upper bound is below it cannot be among the k best.
  // A score that is not finite fails the query.
  float offer(std::int64_t row, float score, float slack);

  // Adds another thread's candidates for the same query.
  void absorb(const Candidates& other);

  // The k best rows of those not below the first floor, exactly scored, best first, ties to the lowest row; null where
  // the query failed.
  const std::vector<Candidate>* settle();

 private:
  void raise_floor(float lower);
  void drop_below_floor();
  void rescore();

  std::int64_t k_;
  std::size_t capacity_;
  ExactScore exact_;
  std::vector<Candidate> entries_;
  std::vector<float> best_lowers_;  // heap, smallest on top, of the k largest lower bounds
  float floor_;
  bool failed_ = false;
};

// One thread's candidates for all queries. Filled by the kernels of every level through offer().
struct CandidateTable {
  std::vector<Candidates> sets;
  std::vector<float> floors;   // one a query, then +infinity up to a multiple of 16
  std::atomic<float>* shared;  // one a query: the highest floor of any thread, which is a floor for all
};

}  // namespace amg
