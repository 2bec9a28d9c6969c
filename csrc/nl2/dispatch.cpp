#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "cpu_level.h"
#include "nl2/nl2.h"
#include "search/candidates.h"
#include "search/threads.h"

namespace amg {
namespace {

constexpr float kByteRounding = 3.1e-8f;  // |r/255 − fp32(r/255)| ≤ 2^-25

DistanceKernels level_kernels() {
#ifdef AMG_X86
  switch (cpu_level()) {
    case CpuLevel::avx512: return avx512::distance_kernels();
    case CpuLevel::avx2: return avx2::distance_kernels();
    default: break;
  }
#endif
  return scalar::distance_kernels();
}

// The queries in the kernels' layouts: floats for floating rows, bytes for byte rows.
struct PreparedQueries {
  std::vector<float> pixels, lost;
  std::vector<std::uint8_t> bytes;
  std::vector<std::int8_t> centred;
  std::vector<std::int64_t> squares;
  std::vector<bool> usable;  // the others are prepared as zeros
};

// ℓ2 in single precision, not below the double one.
float rounded_up_l2(double square, std::int64_t pixels) {
  return static_cast<float>(std::sqrt(square / static_cast<double>(pixels)) * (1 + 1e-6));
}

void prepare_bytes(const double* query, std::int64_t index, std::int64_t pixels, std::int64_t padded, PreparedQueries& prepared) {
  double lost = 0;
  for (std::int64_t i = 0; i < pixels; ++i) {
    const double byte = std::max(0.0, std::min(255.0, std::nearbyint(query[i] * 255)));
    const std::int64_t at = index * padded + i;
    prepared.bytes[at] = static_cast<std::uint8_t>(byte);
    prepared.centred[at] = static_cast<std::int8_t>(byte - 128);
    prepared.squares[index] += static_cast<std::int64_t>(byte * byte);
    lost += (query[i] - byte / 255) * (query[i] - byte / 255);
  }
  prepared.lost[index] = rounded_up_l2(lost, pixels) + kByteRounding;
}

void prepare_floats(const double* query, std::int64_t index, std::int64_t pixels, std::int64_t padded, PreparedQueries& prepared) {
  double lost = 0;
  for (std::int64_t i = 0; i < pixels; ++i) {
    const float rounded = static_cast<float>(query[i]);
    prepared.pixels[index * padded + i] = rounded;
    lost += (query[i] - rounded) * (query[i] - rounded);
  }
  prepared.lost[index] = rounded_up_l2(lost, pixels);
}

bool all_finite(const double* query, std::int64_t pixels) {
  double zero = 0;
  for (std::int64_t i = 0; i < pixels; ++i) zero += query[i] * 0.0;
  return zero == 0;
}

PreparedQueries prepare_queries(const Nl2Args& args, std::int64_t padded) {
  PreparedQueries prepared;
  const bool bytes = args.dtype == DType::u8;
  prepared.usable.resize(args.batch);
  prepared.lost.assign(args.batch, 0.0f);
  prepared.squares.assign(args.batch, 0);
  prepared.pixels.assign(bytes ? 0 : args.batch * padded, 0.0f);
  prepared.bytes.assign(bytes ? args.batch * padded : 0, 0);
  prepared.centred.assign(bytes ? args.batch * padded : 0, 0);
  for (std::int64_t index = 0; index < args.batch; ++index) {
    const double* query = args.queries + index * args.pixels;
    prepared.usable[index] = all_finite(query, args.pixels);
    if (prepared.usable[index]) (bytes ? prepare_bytes : prepare_floats)(query, index, args.pixels, padded, prepared);
  }
  return prepared;
}

std::int64_t element_size(DType dtype) { return dtype == DType::u8 ? 1 : dtype == DType::f32 ? 4 : 2; }

// `found` holds −ℓ2 of the k nearest, nearest first; null where there is no answer.
void write_result(const Nl2Args& args, std::int64_t query, const std::vector<Candidate>* found) {
  if (found == nullptr) {
    args.value[query] = args.distance[query] = args.denominator[query] = std::numeric_limits<float>::quiet_NaN();
    args.row[query] = 0;
    return;
  }
  const std::vector<Candidate>& best = *found;
  double total = 0;
  for (const Candidate& candidate : best) total -= candidate.upper;
  const double denominator = args.alpha * (total / static_cast<double>(best.size()));
  const double distance = -static_cast<double>(best.front().upper);
  args.value[query] = distance == 0 ? 0.0f : static_cast<float>(distance / denominator);
  args.row[query] = best.front().row;
  args.distance[query] = distance == 0 ? 0.0f : static_cast<float>(distance);
  args.denominator[query] = static_cast<float>(denominator);
}

}  // namespace

void nl2(const Nl2Args& args) {
  const DistanceKernels kernels = level_kernels();
  const std::int64_t padded = (args.pixels + kPixelPadding - 1) / kPixelPadding * kPixelPadding;
  const PreparedQueries prepared = prepare_queries(args, padded);
  const DistanceScan scan{args.rows, args.dtype, args.count, args.pixels, args.batch, padded,
                          prepared.pixels.data(), prepared.bytes.data(), prepared.centred.data(),
                          prepared.squares.data(), prepared.lost.data()};
  const std::int64_t row_bytes = args.pixels * element_size(args.dtype);
  const std::function<float(std::int64_t, std::int64_t)> exact = [&](std::int64_t query, std::int64_t row) {
    const void* address = static_cast<const char*>(args.rows) + row * row_bytes;
    return -static_cast<float>(kernels.distance(args.queries + query * args.pixels, address, args.dtype, args.pixels));
  };
  const DistanceScanFunction run = args.dtype == DType::u8 ? kernels.scan_bytes : kernels.scan_floats;
  search_rows(open_floors(prepared.usable), args.count, args.k, args.num_threads, exact,
              [&](std::int64_t begin, std::int64_t end, const Screen& screen) { run(scan, begin, end, screen); },
              [&](std::int64_t query, const std::vector<Candidate>* best) { write_result(args, query, best); });
}

}  // namespace amg
