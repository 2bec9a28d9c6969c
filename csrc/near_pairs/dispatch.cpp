#include <algorithm>
#include <cmath>
#include <limits>
#include <stdexcept>
#include <string>
#include <vector>

#include "cpu_level.h"
#include "near_pairs/near_pairs.h"

namespace amg {

struct NearPairs {
  std::vector<NearPair> list;
};

void found(NearPairs& pairs, std::int64_t left, std::int64_t right, float closeness) {
  pairs.list.push_back({left, right, closeness});
}

namespace {

constexpr double kLeftMax = 63;              // of a left code: with the bias it stays below 128
constexpr std::int64_t kRowsPerThread = 256;  // others that are worth a thread

PairFunction level_kernel() {
#ifdef AMG_X86
  if (cpu_level() != CpuLevel::scalar) return avx2::pair_kernel();
#endif
  return scalar::pair_kernel();
}

// The left rows' sketches in the kernels' layouts.
struct Lefts {
  std::int64_t lanes;
  std::vector<std::uint8_t> packed;
  std::vector<std::int8_t> codes;
  std::vector<float> scales, heads, squares;
  float error = 0, largest_head = 0;
};

void encode_left(const float* sketch, std::int64_t left, Lefts& lefts) {
  double largest = 0;
  for (std::int64_t i = 0; i < kSketch; ++i) {
    const double magnitude = std::fabs(static_cast<double>(sketch[i]));
    if (!(magnitude <= 1e18)) throw std::invalid_argument("`sketches` must be finite, got a non-finite value in row " + std::to_string(left));
    largest = std::max(largest, magnitude);
  }
  const float scale = static_cast<float>(largest / kLeftMax);
  std::uint8_t* packed = lefts.packed.data() + left / kPairLanes * kPairLanes * kHead + left % kPairLanes * 4;
  double lost = 0, head = 0, square = 0;
  for (std::int64_t i = 0; i < kSketch; ++i) {
    const double step = scale, rounded = scale > 0 ? std::clamp(std::nearbyint(sketch[i] / step), -kLeftMax, kLeftMax) : 0;
    lost += (sketch[i] - rounded * step) * (sketch[i] - rounded * step);
    square += rounded * rounded;
    if (i < kHead) head = square;
    lefts.codes[left * kSketch + i] = static_cast<std::int8_t>(rounded);
    if (i < kHead) packed[i / 4 * 4 * kPairLanes + i % 4] = static_cast<std::uint8_t>(rounded + kPairBias);
  }
  lefts.scales[left] = scale;
  lefts.heads[left] = static_cast<float>(head) * scale * scale;
  lefts.squares[left] = static_cast<float>(square) * scale * scale;
  lefts.error = std::max(lefts.error, static_cast<float>(std::sqrt(lost) * (1 + 1e-6)));
  lefts.largest_head = std::max(lefts.largest_head, lefts.heads[left]);
}

Lefts prepare_lefts(const PairArgs& args) {
  constexpr std::int64_t kTile = kPairLanes * kPairGroups;
  Lefts lefts;
  lefts.lanes = (args.lefts + kTile - 1) / kTile * kTile;
  lefts.packed.assign(lefts.lanes * kHead, kPairBias);
  lefts.codes.assign(args.lefts * kSketch, 0);
  lefts.scales.assign(lefts.lanes, 0.0f);
  lefts.heads.assign(lefts.lanes, std::numeric_limits<float>::infinity());
  lefts.squares.assign(args.lefts, 0.0f);
  for (std::int64_t left = 0; left < args.lefts; ++left) encode_left(args.sketches + left * kSketch, left, lefts);
  return lefts;
}

PairScan make_scan(const PairArgs& a, const Lefts& lefts) {
  return {a.rows,
          a.others,
          a.dtype,
          a.lefts,
          a.dimension,
          lefts.packed.data(),
          lefts.codes.data(),
          lefts.scales.data(),
          lefts.heads.data(),
          lefts.squares.data(),
          lefts.lanes,
          lefts.error,
          lefts.largest_head,
          a.codes,
          a.scales,
          a.errors,
          a.reach,
          a.least,
          a.earlier};
}

}  // namespace

std::vector<NearPair> near_pairs(const PairArgs& args) {
  const PairFunction scan = level_kernel();
  const Lefts lefts = prepare_lefts(args);
  const PairScan prepared = make_scan(args, lefts);
  const std::int64_t shares = std::clamp<std::int64_t>(args.count / kRowsPerThread, 1, std::max(args.num_threads, 1));
  std::vector<NearPairs> parts(shares);
#pragma omp parallel for num_threads(static_cast<int>(shares)) schedule(static, 1)
  for (std::int64_t share = 0; share < shares; ++share)
    scan(prepared, args.count * share / shares, args.count * (share + 1) / shares, parts[share]);
  std::vector<NearPair> all;
  for (const NearPairs& part : parts) all.insert(all.end(), part.list.begin(), part.list.end());
  std::sort(all.begin(), all.end(), [](const NearPair& a, const NearPair& b) {
    return a.left != b.left ? a.left < b.left : a.right < b.right;
  });
  return all;
}

}  // namespace amg
