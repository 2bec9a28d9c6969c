// The plainest reader: ORs all words together, in eight independent vectors' worth.
#include <cstdint>

extern "C" std::uint64_t read_words(const std::uint64_t* words, std::int64_t count) {
  constexpr int lanes = 64;
  std::uint64_t seen[lanes] = {};
  for (std::int64_t i = 0; i + lanes <= count; i += lanes)
    for (int lane = 0; lane < lanes; ++lane) seen[lane] |= words[i + lane];
  std::uint64_t all = 0;
  for (const std::uint64_t lane : seen) all |= lane;
  return all;
}
