#include "simd/scalar.h"

#include "top1_cosine/panels.h"

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

struct ScalarLines {
  struct Sum {
    std::int32_t rows[kGroup];
  };
  static constexpr int tile = 1, groups = 1;
  static Sum zero() { return {}; }
  static const std::int8_t* load(const std::int8_t* codes) { return codes; }
  static void square(Sum& sum, const std::int8_t* codes) {
    for (int i = 0; i < kLine; ++i) sum.rows[i / 4] += codes[i] * codes[i];
  }
  static void add(Sum& sum, const std::int8_t* codes, std::int32_t word) {
    std::int8_t query[4];
    std::memcpy(query, &word, sizeof query);
    for (int i = 0; i < kLine; ++i) sum.rows[i / 4] += codes[i] * query[i % 4];
  }
  static void store(std::int32_t* out, const Sum& sum, std::int32_t) { std::memcpy(out, sum.rows, sizeof sum.rows); }
};

}  // namespace

namespace amg::scalar {

CosineKernels cosine_kernels() { return with_panels<ScalarVec, ScalarLines>(make_kernels<ScalarVec>(scan_codes)); }

}  // namespace amg::scalar
