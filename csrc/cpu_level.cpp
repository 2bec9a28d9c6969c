#include "cpu_level.h"

#include <cstdlib>
#include <stdexcept>
#include <string>

namespace amg {

CpuLevel detected_level() {
#ifdef AMG_X86
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
                      __builtin_cpu_supports("avx512vnni");
  if (avx2 && avx512) return CpuLevel::avx512;
  if (avx2) return CpuLevel::avx2;
#endif
  return CpuLevel::scalar;
}

const char* level_name(CpuLevel level) {
  static const char* const names[] = {"scalar", "avx2", "avx512"};
  return names[static_cast<int>(level)];
}

static CpuLevel chosen_level() {
  const CpuLevel best = detected_level();
  const char* forced = std::getenv("AMG_CPU_LEVEL");
  if (forced == nullptr || *forced == '\0') return best;
  for (const CpuLevel level : {CpuLevel::scalar, CpuLevel::avx2, CpuLevel::avx512}) {
    if (std::string(forced) != level_name(level)) continue;
    if (level > best) throw std::invalid_argument(std::string("AMG_CPU_LEVEL=") + forced + " is not offered by this CPU, best is " + level_name(best));
    return level;
  }
  throw std::invalid_argument(std::string("AMG_CPU_LEVEL must be scalar, avx2 or avx512, got ") + forced);
}

CpuLevel cpu_level() {
  static const CpuLevel level = chosen_level();
  return level;
}

}  // namespace amg
