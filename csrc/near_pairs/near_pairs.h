// Pairs of rows that are close to one another, all of them; see kernels/near_pairs/README.md.
#pragma once

#include <cstdint>
#include <vector>

#include "dtype.h"

namespace amg {

constexpr std::int64_t kSketch = 64;     // elements of a sketch
constexpr std::int64_t kHead = 32;       // of these, the ones that every pair is compared by
constexpr std::int64_t kPairLanes = 8;   // rows side by side in the packed layout
constexpr std::int64_t kPairGroups = 4;  // groups of these that a kernel takes at once
constexpr int kPairBias = 64;            // makes the codes of the packed rows unsigned; they are within ±63

struct NearPair {
  std::int64_t left, right;
  float closeness;
};

// Where the kernels leave what they find.
struct NearPairs;
void found(NearPairs& pairs, std::int64_t left, std::int64_t right, float closeness);

// What the kernels compare: `lefts` rows, prepared, with `others`.
struct PairScan {
  const void* rows;    // [lefts, dimension] of dtype
  const void* others;  // [count, dimension] of dtype
  DType dtype;         // u8: root mean square distance of value/255; else the dot product
  std::int64_t lefts, dimension;
  const std::uint8_t* packed;  // [groups][kHead / 4][kPairLanes][4], codes + kPairBias
  const std::int8_t* left_codes;  // [lefts, kSketch]
  const float* left_scales;       // [lanes], lanes being lefts up to a multiple of kPairLanes·kPairGroups
  const float* left_heads;        // [lanes], ‖scale·head‖², +infinity beyond lefts
  const float* left_squares;      // [lefts], ‖scale·code‖²
  std::int64_t lanes;
  float left_error, largest_head;  // the largest ‖sketch − scale·code‖, the largest of left_heads below infinity
  const std::int8_t* codes;        // [count, kSketch] of the others' sketches
  const float* scales;             // [count]
  const float* errors;             // [count], ‖sketch − scale·code‖ ≤ error
  double reach;                    // ‖a − b‖ of a pair is at most this
  float least;                     // closeness of a pair is at least this
  bool earlier;                    // only pairs with right < left: both are the same rows
};

// Finds the pairs with others [begin, end).
using PairFunction = void (*)(const PairScan&, std::int64_t begin, std::int64_t end, NearPairs&);

namespace scalar { PairFunction pair_kernel(); }
namespace avx2 { PairFunction pair_kernel(); }

// One search. All pointers are contiguous tensors.
struct PairArgs {
  const void* rows;
  const void* others;
  const float* sketches;  // [lefts, kSketch]
  const std::int8_t* codes;
  const float* scales;
  const float* errors;
  std::int64_t lefts, count, dimension;
  DType dtype;
  double reach;
  float least;
  bool earlier;
  int num_threads;
};

// Every pair with closeness ≥ least, by left, then right. Throws std::invalid_argument for a sketch that is not finite.
std::vector<NearPair> near_pairs(const PairArgs& args);

}  // namespace amg
