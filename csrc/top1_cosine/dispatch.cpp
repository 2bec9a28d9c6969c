#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <numeric>
#include <stdexcept>
#include <string>
#include <vector>

#include "cpu_level.h"
#include "search/candidates.h"
#include "search/threads.h"
#include "top1_cosine/top1_cosine.h"

namespace amg {
namespace {

constexpr double kCodeMax = 127;

CosineKernels level_kernels() {
#ifdef AMG_X86
  switch (cpu_level()) {
    case CpuLevel::avx512: return avx512::cosine_kernels();
    case CpuLevel::avx2: return avx2::cosine_kernels();
    default: break;
  }
#endif
  return scalar::cosine_kernels();
}

// Everything the kernels need of the queries, in their layouts.
struct PreparedQueries {
  std::vector<double> norms;
  std::vector<bool> usable;  // the others are prepared as zeros
  std::vector<float> unit, scales, errors, reach;
  std::vector<std::int8_t> codes;
  std::vector<std::uint8_t> packed;
  std::vector<std::int32_t> sums;
};

// Sums in eight lanes, so that no addition waits for the one before; `term` of [0, size).
template <class Term>
double lane_sum(std::int64_t size, Term term) {
  double lanes[8] = {}, total = 0;
  std::int64_t i = 0;
  for (; i + 8 <= size; i += 8)
    for (int lane = 0; lane < 8; ++lane) lanes[lane] += term(i + lane);
  for (; i < size; ++i) total += term(i);
  for (const double lane : lanes) total += lane;
  return total;
}

double largest_magnitude(const std::vector<double>& values) {
  double lanes[8] = {}, largest = 0;
  for (std::size_t i = 0; i < values.size(); i += 8)
    for (int lane = 0; lane < 8; ++lane) {
      const double magnitude = std::fabs(values[i + lane]);
      lanes[lane] = magnitude > lanes[lane] ? magnitude : lanes[lane];
    }
  for (const double lane : lanes) largest = std::max(largest, lane);
  return largest;
}

// `unit` is padded with zeros like the codes. |unit / scale| rounds to 127 at most, scale being exact to 2^-24.
void encode_query(const std::vector<double>& unit, std::int64_t query, PreparedQueries& prepared) {
  constexpr double kShift = 6755399441055744.0;  // 1.5·2^52: adding it rounds, and leaves the integer in the low bits
  const std::int64_t padded = static_cast<std::int64_t>(unit.size());
  const float scale = static_cast<float>(largest_magnitude(unit) / kCodeMax);
  const double step = scale, inverse = 1.0 / step;
  std::int8_t* codes = prepared.codes.data() + query * padded;
  const double lost = lane_sum(padded, [&](std::int64_t i) {
    const double shifted = unit[i] * inverse + kShift, difference = unit[i] - (shifted - kShift) * step;
    std::int64_t bits;
    std::memcpy(&bits, &shifted, sizeof bits);
    codes[i] = static_cast<std::int8_t>(bits);
    return difference * difference;
  });
  prepared.scales[query] = scale;
  prepared.errors[query] = static_cast<float>(std::sqrt(lost) * (1 + 1e-6)) + kRoundingSlack;
  prepared.reach[query] = static_cast<float>(prepared.errors[query] * 128 * std::sqrt(padded) * (1 + 1e-5));
  prepared.sums[query] = std::accumulate(codes, codes + padded, std::int32_t{0});
}

// [groups][padded / 4][kLanes][4]: four consecutive dimensions of sixteen queries, biased to unsigned.
void pack_queries(std::int64_t batch, std::int64_t padded, PreparedQueries& prepared) {
  const std::int64_t groups = (batch + kLanes - 1) / kLanes;
  prepared.packed.assign(groups * padded * kLanes, 128);
  for (std::int64_t query = 0; query < batch; ++query) {
    std::uint8_t* lane = prepared.packed.data() + (query / kLanes * padded * kLanes + query % kLanes * 4);
    const std::int8_t* codes = prepared.codes.data() + query * padded;
    for (std::int64_t i = 0; i < padded; i += 4)
      for (int byte = 0; byte < 4; ++byte) lane[i * kLanes + byte] = static_cast<std::uint8_t>(codes[i + byte] + 128);
  }
}

PreparedQueries prepare_queries(const CosineArgs& args, std::int64_t padded) {
  const std::int64_t lanes = (args.batch + kLanes - 1) / kLanes * kLanes;
  PreparedQueries prepared;
  prepared.norms.resize(args.batch);
  prepared.usable.resize(args.batch);
  std::vector<double> unit(padded);
  prepared.unit.assign(args.batch * padded, 0.0f);
  prepared.codes.assign(args.batch * padded, 0);
  prepared.scales.assign(lanes, 0.0f);
  prepared.errors.assign(lanes, 0.0f);
  prepared.reach.assign(lanes, 0.0f);
  prepared.sums.assign(lanes, 0);
  for (std::int64_t query = 0; query < args.batch; ++query) {
    const double* raw = args.queries + query * args.dimension;
    prepared.norms[query] = std::sqrt(lane_sum(args.dimension, [raw](std::int64_t i) { return raw[i] * raw[i]; }));
    prepared.usable[query] = prepared.norms[query] >= kMinNorm && std::isfinite(prepared.norms[query]);
    if (!prepared.usable[query]) continue;
    for (std::int64_t i = 0; i < args.dimension; ++i) {
      unit[i] = raw[i] / prepared.norms[query];
      prepared.unit[query * padded + i] = static_cast<float>(unit[i]);
    }
    if (args.codes != nullptr) encode_query(unit, query, prepared);
  }
  if (args.codes != nullptr && args.batch >= kPackedFrom) pack_queries(args.batch, padded, prepared);
  return prepared;
}

std::int64_t element_size(DType dtype) { return dtype == DType::f32 ? 4 : 2; }

void write_result(const CosineArgs& args, std::int64_t query, const std::vector<Candidate>& best) {
  float* similarity = args.similarity + query * args.k;
  std::int64_t* row = args.row + query * args.k;
  std::fill_n(similarity, args.k, std::numeric_limits<float>::quiet_NaN());
  std::fill_n(row, args.k, std::int64_t{0});
  for (std::size_t rank = 0; rank < best.size(); ++rank) {
    similarity[rank] = best[rank].upper;
    row[rank] = best[rank].row;
  }
}

}  // namespace

void topk_cosine(const CosineArgs& args) {
  const CosineKernels kernels = level_kernels();
  const std::int64_t padded = (args.dimension + kPadding - 1) / kPadding * kPadding;
  const PreparedQueries prepared = prepare_queries(args, padded);
  const CosineScan scan{args.rows, args.dtype, args.count, args.dimension, args.codes, args.scales, args.errors, args.batch,
                        padded, prepared.unit.data(), prepared.codes.data(), prepared.packed.data(),
                        prepared.scales.data(), prepared.errors.data(), prepared.reach.data(), prepared.sums.data()};
  const std::int64_t row_bytes = args.dimension * element_size(args.dtype);
  const std::function<float(std::int64_t, std::int64_t)> exact = [&](std::int64_t query, std::int64_t row) {
    const void* address = static_cast<const char*>(args.rows) + row * row_bytes;
    const double dot = kernels.dot(args.queries + query * args.dimension, address, args.dtype, args.dimension);
    return static_cast<float>(dot / prepared.norms[query]);
  };
  const ScanFunction run = args.codes == nullptr ? kernels.scan_rows : kernels.scan_codes;
  search_rows(prepared.usable, args.count, args.k, args.num_threads, exact,
              [&](std::int64_t begin, std::int64_t end, const Screen& screen) { run(scan, begin, end, screen); },
              [&](std::int64_t query, const std::vector<Candidate>& best) { write_result(args, query, best); });
}

void encode_rows(const void* rows, DType dtype, std::int64_t count, std::int64_t dimension, std::int8_t* codes,
                 float* scales, float* errors, int num_threads) {
  const EncodeFunction encode = level_kernels().encode;
  const std::int64_t row_bytes = dimension * element_size(dtype);
  std::int64_t bad_row = count;
#pragma omp parallel for num_threads(num_threads) reduction(min : bad_row)
  for (std::int64_t row = 0; row < count; ++row) {
    const void* address = static_cast<const char*>(rows) + row * row_bytes;
    if (!encode(address, dtype, dimension, codes + row * dimension, scales + row, errors + row))
      bad_row = std::min(bad_row, row);
  }
  if (bad_row < count)
    throw std::invalid_argument("`rows` must be finite, got a non-finite value in row " + std::to_string(bad_row));
}

}  // namespace amg
