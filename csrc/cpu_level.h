// Which instruction set the kernels use: chosen once, from the CPU, at first use.
#pragma once

namespace amg {

enum class CpuLevel { scalar = 0, avx2 = 1, avx512 = 2 };

// The best level this CPU offers. AVX-512 here means F, BW, DQ, VL and VNNI.
CpuLevel detected_level();

// detected_level(), or the lower level named by AMG_CPU_LEVEL (read once; for tests that run each level).
// Throws std::invalid_argument for an unknown name or a level above the detected one.
CpuLevel cpu_level();

const char* level_name(CpuLevel level);

}  // namespace amg
