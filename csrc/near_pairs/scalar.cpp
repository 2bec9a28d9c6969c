#include "simd/scalar.h"

#include "near_pairs/body.h"

namespace {

void scan(const PairScan& s, std::int64_t begin, std::int64_t end, NearPairs& pairs) {
  for (std::int64_t row = begin; row < end; ++row) {
    const RowBound bound = row_bound(s, row);
    const std::int8_t* code = s.codes + row * kSketch;
    for (std::int64_t left = 0; left < s.lefts; ++left) {
      const std::uint8_t* packed = s.packed + left / kPairLanes * kPairLanes * kHead + left % kPairLanes * 4;
      std::int32_t dot = -bound.bias;
      for (std::int64_t i = 0; i < kHead; ++i) dot += packed[i / 4 * 4 * kPairLanes + i % 4] * code[i];
      const float product = s.left_scales[left] * bound.factor * static_cast<float>(dot);
      if (product + bound.bound >= s.left_heads[left]) consider<ScalarVec>(s, left, row, pairs);
    }
  }
}

}  // namespace

namespace amg::scalar {

PairFunction pair_kernel() { return scan; }

}  // namespace amg::scalar
