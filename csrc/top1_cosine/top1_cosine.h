// Exact cosine search by screening with bounds; see kernels/top1_cosine/README.md.
#pragma once

#include <cstdint>

#include "dtype.h"

namespace amg {

struct Screen;

constexpr std::int64_t kLanes = 16;        // queries side by side in the packed layout
constexpr std::int64_t kGroup = 16;        // rows side by side in panels
constexpr std::int64_t kPadding = 64;      // query rows are padded with zeros to a multiple of this
constexpr std::int64_t kPackedFrom = 9;    // queries from which lanes hold queries instead of dimensions
constexpr double kMinNorm = 1e-150;        // the squares of a query below this lose digits, then vanish
constexpr float kRoundingSlack = 2e-6f;    // per unit of row norm: fp32 roundings of the score, and ties in fp32

// What the kernels screen: rows, or their int8 codes, against prepared queries.
struct CosineScan {
  const void* rows;  // [count, dimension] of dtype
  DType dtype;
  std::int64_t count, dimension;
  const std::int8_t* codes;  // [count, dimension], or null: screen on the rows
  const float* scales;       // [count]
  const float* errors;       // [count], ‖r − scale·code‖ ≤ error
  std::int64_t queries;
  std::int64_t padded;             // dimension, up to a multiple of kPadding
  const float* unit;               // [queries, padded], normalised
  const std::int8_t* query_codes;  // [queries, padded]
  const std::uint8_t* packed;      // [groups of kLanes queries][padded / 4][kLanes][4], codes + 128
  const float* query_scales;       // these four are padded to a multiple of kLanes
  const float* query_errors;       // slack per unit of ‖r̂‖: ‖q − q̂‖ and the rounding
  const float* query_reach;        // slack per unit of the row's scale, from ‖r̂‖ ≤ scale·128·√dimension
  const std::int32_t* query_sums;  // Σ codes
};

// Codes in panels: a panel holds 4·words columns of all rows, a group of kGroup rows after the other, of each the first
// four columns of all its rows, the next four, … Zeros beyond the last row and column.
struct PanelScan {
  const std::int8_t* codes;     // [panels][groups][words][kGroup][4]
  const float* scales;          // these three [groups·kGroup]
  const float* errors;          // ‖r − scale·code‖ ≤ error, r in the basis of the codes
  const std::int32_t* squares;  // Σ code²
  std::int64_t count, groups, panels, words;
  std::int64_t queries;
  std::int64_t padded;
  const std::int8_t* query_codes;   // [queries, padded], in the basis of the codes
  const float* query_scales;        // these two as in CosineScan
  const float* query_errors;
  const std::int32_t* query_biases;  // these two [queries, panels]: 128 Σ code, of the columns of panels 0 … p
  const float* query_tails;          // ‖q̂‖ of those beyond them
};

// Screens rows [begin, end), offering what may be among the best.
using ScanFunction = void (*)(const CosineScan&, std::int64_t begin, std::int64_t end, const Screen&);
// The same on panels; rows begin and end with the groups that begin in [begin, end).
using PanelFunction = void (*)(const PanelScan&, std::int64_t begin, std::int64_t end, const Screen&);
// Of those groups, the row that scores highest on the first panel, where that is more than `scores`.
using GuessFunction = void (*)(const PanelScan&, std::int64_t begin, std::int64_t end, float* scores, std::int64_t* rows);
// ⟨query, row⟩ in double, in an order that is the same at every level.
using DotFunction = double (*)(const double* query, const void* row, DType dtype, std::int64_t dimension);
// Writes code, scale and error of one row; false if the row is not finite.
using EncodeFunction = bool (*)(const void* row, DType dtype, std::int64_t dimension, std::int8_t* code, float* scale,
                                float* error);

struct CosineKernels {
  ScanFunction scan_rows, scan_codes;
  DotFunction dot;
  EncodeFunction encode;
  PanelFunction scan_panels;
  GuessFunction guess_rows;
};

namespace scalar { CosineKernels cosine_kernels(); }
namespace avx2 { CosineKernels cosine_kernels(); }
namespace avx512 { CosineKernels cosine_kernels(); }

// One search. All pointers are contiguous tensors; codes, scales and errors are null or given together, `squares` too
// where the codes are in panels, of `width` columns each.
struct CosineArgs {
  const double* queries;  // [batch, dimension]
  const double* turned;   // the same in the basis of the codes
  const void* rows;
  const std::int8_t* codes;
  const float* scales;
  const float* errors;
  const std::int32_t* squares;
  const float* limits;  // [batch], or null: rows below are of no interest
  float* similarity;  // [batch, k]
  std::int64_t* row;  // [batch, k]
  std::int64_t batch, count, dimension, k, width;
  DType dtype;
  int num_threads;
};

// Similarity −infinity and row −1 where no further row reaches the limit.
// Similarity NaN and row 0 for a query that is not finite or shorter than kMinNorm, or where a row makes a score NaN.
void topk_cosine(const CosineArgs& args);

// Encodes [count, dimension] rows; throws std::invalid_argument naming the first row that is not finite.
void encode_rows(const void* rows, DType dtype, std::int64_t count, std::int64_t dimension, std::int8_t* codes,
                 float* scales, float* errors, int num_threads);

}  // namespace amg
