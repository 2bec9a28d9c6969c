// All that the kernels of each instruction set need to know of candidates.
#pragma once

#include <cstdint>

namespace amg {

struct CandidateTable;

// One thread's table as the kernels see it: floors[query] rises as rows are offered.
struct Screen {
  CandidateTable* table;
  const float* floors;  // one a query, then +infinity up to a multiple of 16
};

// Takes the bounds score ± slack of a row; updates the query's floor.
void offer(const Screen& screen, std::int64_t query, std::int64_t row, float score, float slack);

// Raises this thread's floors to the highest of any thread.
void share_floors(const Screen& screen);

}  // namespace amg

namespace {

// Offers a row unless its upper bound is below the query's floor. NaN is always offered: it fails the query.
inline void screen_score(const amg::Screen& screen, std::int64_t query, std::int64_t row, float score, float slack) {
  if (!(score + slack < screen.floors[query])) amg::offer(screen, query, row, score, slack);
}

}  // namespace
