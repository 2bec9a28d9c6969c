// The pixel metric: exact k nearest rows in ℓ2 by screening with bounds; see kernels/nl2/README.md.
#pragma once

#include <cstdint>

#include "dtype.h"

namespace amg {

struct Screen;

constexpr std::int64_t kPixelPadding = 64;    // query rows are padded with zeros to a multiple of this
constexpr std::int64_t kSegment = 32768;      // pixels whose products of bytes an int32 holds the sum of
constexpr float kDistanceSlack = 2e-6f;       // relative: fp32 roundings of a distance, and ties in fp32

// What the kernels screen. Byte rows are compared with queries rounded to bytes, in exact integers.
struct DistanceScan {
  const void* rows;  // [count, pixels] of dtype
  DType dtype;
  std::int64_t count, pixels;
  std::int64_t queries, padded;
  const float* query_pixels;         // [queries, padded]; for floating rows
  const std::uint8_t* query_bytes;   // [queries, padded]; for byte rows, round(255·q) clipped
  const std::int8_t* query_signed;   // the same less 128
  const std::int64_t* query_squares;  // Σ bytes²
  const float* query_lost;           // ℓ2(q, what it was rounded to) and of bytes to fp32, rounded up
};

// Screens rows [begin, end), offering what may be among the nearest with score −ℓ2.
using DistanceScanFunction = void (*)(const DistanceScan&, std::int64_t begin, std::int64_t end, const Screen&);
// ℓ2(query, row) by direct difference in double; bytes are read as r/255 in fp32.
using DistanceFunction = double (*)(const double* query, const void* row, DType dtype, std::int64_t pixels);

struct DistanceKernels {
  DistanceScanFunction scan_bytes, scan_floats;
  DistanceFunction distance;
};

namespace scalar { DistanceKernels distance_kernels(); }
namespace avx2 { DistanceKernels distance_kernels(); }
namespace avx512 { DistanceKernels distance_kernels(); }

// All pointers are contiguous tensors.
struct Nl2Args {
  const double* queries;  // [batch, pixels]
  const void* rows;       // [count, pixels]
  float* value;           // these four are [batch]
  std::int64_t* row;
  float* distance;
  float* denominator;
  std::int64_t batch, count, pixels, k;
  double alpha;
  DType dtype;
  int num_threads;
};

// NaN and row 0 for a query that is not finite, or where a row makes a distance NaN.
void nl2(const Nl2Args& args);

}  // namespace amg
