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
  std::vector<std::int32_t> biases;  // these two of panels
  std::vector<float> tails;
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

// What is left of each query beyond each panel.
void prepare_tails(const CosineArgs& args, std::int64_t panels, std::int64_t padded, PreparedQueries& prepared) {
  prepared.biases.assign(args.batch * panels, 0);
  prepared.tails.assign(args.batch * panels, 0.0f);
  for (std::int64_t query = 0; query < args.batch; ++query) {
    const std::int8_t* codes = prepared.codes.data() + query * padded;
    std::int32_t sum = 0, squares = 0;
    for (std::int64_t panel = 0; panel < panels; ++panel) {
      for (std::int64_t i = 0; i < args.width; ++i) sum += codes[panel * args.width + i];
      prepared.biases[query * panels + panel] = 128 * sum;
    }
    for (std::int64_t panel = panels; panel-- > 0;) {
      const double tail = prepared.scales[query] * std::sqrt(static_cast<double>(squares)) * (1 + 1e-6);
      prepared.tails[query * panels + panel] = static_cast<float>(tail);
      for (std::int64_t i = 0; i < args.width; ++i) squares += codes[panel * args.width + i] * codes[panel * args.width + i];
    }
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
    const double* screened = args.turned + query * args.dimension;
    for (std::int64_t i = 0; i < args.dimension; ++i) {
      unit[i] = screened[i] / prepared.norms[query];
      prepared.unit[query * padded + i] = static_cast<float>(unit[i]);
    }
    if (args.codes != nullptr) encode_query(unit, query, prepared);
  }
  if (args.codes != nullptr && args.squares == nullptr && args.batch >= kPackedFrom) pack_queries(args.batch, padded, prepared);
  return prepared;
}

std::int64_t element_size(DType dtype) { return dtype == DType::f32 ? 4 : 2; }

void write_result(const CosineArgs& args, std::int64_t query, const std::vector<Candidate>* found) {
  constexpr float kInfinity = std::numeric_limits<float>::infinity();
  float* similarity = args.similarity + query * args.k;
  std::int64_t* row = args.row + query * args.k;
  std::fill_n(similarity, args.k, found == nullptr ? std::numeric_limits<float>::quiet_NaN() : -kInfinity);
  std::fill_n(row, args.k, std::int64_t{found == nullptr ? 0 : -1});
  if (found == nullptr) return;
  for (std::size_t rank = 0; rank < found->size(); ++rank) {
    similarity[rank] = (*found)[rank].upper;
    row[rank] = (*found)[rank].row;
  }
}

using ExactScore = std::function<float(std::int64_t query, std::int64_t row)>;
using ScanShare = std::function<void(std::int64_t begin, std::int64_t end, const Screen& screen)>;

std::vector<float> limit_floors(const CosineArgs& args, const PreparedQueries& prepared) {
  std::vector<float> floors = open_floors(prepared.usable);
  if (args.limits != nullptr)
    for (std::int64_t query = 0; query < args.batch; ++query)
      if (args.limits[query] > floors[query]) floors[query] = args.limits[query];
  return floors;
}

// Whether the first panel holds more than four times its share of what the queries are.
bool first_panel_tells(const PanelScan& scan) {
  double rest = 0;
  for (std::int64_t query = 0; query < scan.queries; ++query) {
    const double tail = scan.query_tails[query * scan.panels];
    rest += tail * tail;
  }
  return rest * scan.panels <= (scan.panels - 4.0) * scan.queries;
}

// Raises each query's floor to the similarity of a row that looks like the closest.
void raise_floors(const PanelScan& scan, GuessFunction guess, const ExactScore& exact, int num_threads,
                  std::vector<float>& floors) {
#pragma omp parallel for num_threads(num_threads) schedule(static, 1)
  for (int share = 0; share < num_threads; ++share) {
    std::vector<float> scores(scan.queries, -std::numeric_limits<float>::infinity());
    std::vector<std::int64_t> rows(scan.queries, -1);
    guess(scan, scan.count * share / num_threads, scan.count * (share + 1) / num_threads, scores.data(), rows.data());
    for (std::int64_t query = 0; query < scan.queries; ++query) {
      if (rows[query] < 0 || std::isnan(floors[query])) continue;
      const float similarity = exact(query, rows[query]);
#pragma omp critical
      if (std::isfinite(similarity)) floors[query] = std::max(floors[query], similarity);
    }
  }
}

}  // namespace

void topk_cosine(const CosineArgs& args) {
  const CosineKernels kernels = level_kernels();
  const bool in_panels = args.squares != nullptr;
  const std::int64_t panels = in_panels ? (args.dimension + args.width - 1) / args.width : 0;
  const std::int64_t padded = (std::max(args.dimension, panels * args.width) + kPadding - 1) / kPadding * kPadding;
  PreparedQueries prepared = prepare_queries(args, padded);
  if (in_panels) prepare_tails(args, panels, padded, prepared);
  const CosineScan scan{args.rows, args.dtype, args.count, args.dimension, args.codes, args.scales, args.errors, args.batch,
                        padded, prepared.unit.data(), prepared.codes.data(), prepared.packed.data(),
                        prepared.scales.data(), prepared.errors.data(), prepared.reach.data(), prepared.sums.data()};
  const PanelScan panel_scan{args.codes, args.scales, args.errors, args.squares, args.count, ((args.count + kGroup - 1) / kGroup + 6) / 8 * 8 + 1,
                             panels, args.width / 4, args.batch, padded, prepared.codes.data(), prepared.scales.data(),
                             prepared.errors.data(), prepared.biases.data(), prepared.tails.data()};
  const std::int64_t row_bytes = args.dimension * element_size(args.dtype);
  const ExactScore exact = [&](std::int64_t query, std::int64_t row) {
    const void* address = static_cast<const char*>(args.rows) + row * row_bytes;
    const double dot = kernels.dot(args.queries + query * args.dimension, address, args.dtype, args.dimension);
    return static_cast<float>(dot / prepared.norms[query]);
  };
  std::vector<float> floors = limit_floors(args, prepared);
  if (in_panels && args.k == 1 && first_panel_tells(panel_scan))
    raise_floors(panel_scan, kernels.guess_rows, exact, args.num_threads, floors);
  const ScanFunction run = args.codes == nullptr ? kernels.scan_rows : kernels.scan_codes;
  const ScanShare screen = [&](std::int64_t begin, std::int64_t end, const Screen& view) {
    if (in_panels)
      kernels.scan_panels(panel_scan, begin, end, view);
    else
      run(scan, begin, end, view);
  };
  search_rows(floors, args.count, args.k, args.num_threads, exact, screen,
              [&](std::int64_t query, const std::vector<Candidate>* found) { write_result(args, query, found); });
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
