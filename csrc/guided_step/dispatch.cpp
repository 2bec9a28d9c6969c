#include <algorithm>
#include <vector>

#include "cpu_level.h"
#include "guided_step/guided_step.h"

namespace amg {
namespace {

constexpr int kSignals = 4;
constexpr std::int64_t kParallelFrom = 32768;  // elements; below, starting threads costs more than it saves

GuidedStepBlock block_function() {
#ifdef AMG_X86
  switch (cpu_level()) {
    case CpuLevel::avx512: return avx512::guided_step_block;
    case CpuLevel::avx2: return avx2::guided_step_block;
    default: break;
  }
#endif
  return scalar::guided_step_block;
}

// Writing past the caches spares reading each line in order to overwrite it, but the next reader finds nothing there.
bool worth_streaming(const GuidedStepArgs& args) {
  constexpr std::int64_t kFrom = 2 << 20, kVector = 64;  // bytes of an output, about a core's own cache; of a vector
  const std::int64_t sample_bytes = args.size * static_cast<std::int64_t>(sizeof(float));
  const auto aligned = [](const void* p) { return reinterpret_cast<std::uintptr_t>(p) % kVector == 0; };
  return args.dtype == DType::f32 && args.batch * sample_bytes >= kFrom && sample_bytes % kVector == 0 &&
         aligned(args.x0_hat) && aligned(args.prev_sample);
}

SampleScales sample_scales(const GuidedStepArgs& args, std::int64_t sample_index) {
  const float* row = args.coefficients + sample_index * args.coefficient_stride;
  const float threshold = row[5], s0 = row[6], c1 = row[7], c2 = row[8], c3 = row[9];
  SampleScales scales{row[0], row[1], row[2], row[3], row[4], s0, 0.0f, 0.0f, false};
  if (args.similarity == nullptr || !(args.similarity[sample_index] > threshold)) return scales;
  const float similarity = args.similarity[sample_index];
  const float s1 = std::max(std::min(c1 * similarity, s0 - 1.0f), 0.0f);
  scales.guidance = s0 - s1;
  scales.caption = std::max(std::min(c2 * similarity, s0 - s1 - 1.0f), 0.0f);
  scales.push = c3 * row[3];
  scales.open = true;
  return scales;
}

}  // namespace

void guided_step(const GuidedStepArgs& given) {
  GuidedStepArgs args = given;
  args.stream = worth_streaming(args);
  const GuidedStepBlock run = block_function();
  const std::int64_t blocks = (args.size + kSignalBlock - 1) / kSignalBlock, tasks = args.batch * blocks;
  std::vector<double> partial(tasks * kSignals);
#pragma omp parallel for schedule(static) num_threads(args.num_threads) if (args.batch * args.size >= kParallelFrom)
  for (std::int64_t task = 0; task < tasks; ++task) {
    const std::int64_t sample_index = task / blocks, begin = (task % blocks) * kSignalBlock;
    const SampleScales scales = sample_scales(args, sample_index);
    run(args, scales, sample_index, begin, std::min(begin + kSignalBlock, args.size), &partial[task * kSignals]);
  }
  // Summed in block order, so that the number of threads changes nothing.
  const int width = args.prev_sample == nullptr ? 3 : kSignals;
  for (std::int64_t sample_index = 0; sample_index < args.batch; ++sample_index)
    for (int signal = 0; signal < width; ++signal) {
      double total = 0;
      for (std::int64_t block = 0; block < blocks; ++block) total += partial[(sample_index * blocks + block) * kSignals + signal];
      args.signals[sample_index * width + signal] = static_cast<float>(total);
    }
}

}  // namespace amg
