#include "simd/scalar.h"

#include "top1_cosine/body.h"

namespace {

void scan_codes(const CosineScan& s, std::int64_t begin, std::int64_t end, const Screen& screen) {
  for (std::int64_t row = begin; row < end; ++row) {
    const std::int8_t* code = s.codes + row * s.dimension;
    std::int64_t squares = 0;
    for (std::int64_t i = 0; i < s.dimension; ++i) squares += code[i] * code[i];
    const RowBounds bounds = row_bounds(s, row, squares);
    for (std::int64_t query = 0; query < s.queries; ++query) {
      const std::int8_t* query_code = s.query_codes + query * s.padded;
      std::int32_t dot = 0;
      for (std::int64_t i = 0; i < s.dimension; ++i) dot += code[i] * query_code[i];
      offer_code(s, bounds, query, row, dot, screen);
    }
  }
}

}  // namespace

namespace amg::scalar {

CosineKernels cosine_kernels() { return make_kernels<ScalarVec>(scan_codes); }

}  // namespace amg::scalar
