#include "simd/scalar.h"

#include "nl2/body.h"

namespace {

void scan_bytes(const DistanceScan& s, std::int64_t begin, std::int64_t end, const Screen& screen) {
  for (std::int64_t row = begin; row < end; ++row) {
    const std::uint8_t* bytes = static_cast<const std::uint8_t*>(s.rows) + row * s.pixels;
    std::int64_t row_square = 0;
    for (std::int64_t i = 0; i < s.pixels; ++i) row_square += bytes[i] * bytes[i];
    for (std::int64_t query = 0; query < s.queries; ++query) {
      const std::uint8_t* query_bytes = s.query_bytes + query * s.padded;
      std::int64_t dot = 0;
      for_segments(s.pixels, [&](std::int64_t from, std::int64_t to) {
        std::uint32_t sum = 0;
        for (std::int64_t i = from; i < to; ++i) sum += static_cast<std::uint32_t>(bytes[i] * query_bytes[i]);
        dot += sum;
      });
      offer_bytes(s, query, row, dot, row_square, screen);
    }
  }
}

}  // namespace

namespace amg::scalar {

DistanceKernels distance_kernels() { return make_kernels<ScalarVec>(scan_bytes); }

}  // namespace amg::scalar
