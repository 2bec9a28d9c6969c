// Runs a screening kernel over all rows, a contiguous share a thread, and settles what it leaves.
#pragma once

#include <cstdint>
#include <functional>
#include <vector>

#include "search/candidates.h"
#include "search/offer.h"

namespace amg {

// −infinity for each query that is usable, NaN for the others.
std::vector<float> open_floors(const std::vector<bool>& usable);

// `screen` offers rows [begin, end); `exact` decides between what is left; `take` receives each query's k best rows,
// best first, fewer where fewer reach the query's floor, and null for a query whose floor is NaN, which says that it is
// not usable, or that met a score which is not finite. `screen` must offer finite scores of the queries that are not
// usable, so that they pass no gate.
void search_rows(const std::vector<float>& floors, std::int64_t count, std::int64_t k, int num_threads,
                 const std::function<float(std::int64_t query, std::int64_t row)>& exact,
                 const std::function<void(std::int64_t begin, std::int64_t end, const Screen& screen)>& screen,
                 const std::function<void(std::int64_t query, const std::vector<Candidate>* best)>& take);

}  // namespace amg
