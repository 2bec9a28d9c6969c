#include <algorithm>
#include <cmath>
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
  return args.dtype == DType::f32 && args.network_dtype == DType::f32 && args.prev_sample != args.sample &&
         args.batch * sample_bytes >= kFrom && sample_bytes % kVector == 0 && aligned(args.x0_hat) &&
         aligned(args.prev_sample);
}

// Summed in block order, so that the number of threads changes nothing.
void write_signals(const GuidedStepArgs& args, const std::vector<double>& partial, std::int64_t blocks) {
  const int width = args.prev_sample == nullptr ? 3 : kSignals;
  for (std::int64_t sample_index = 0; sample_index < args.batch; ++sample_index) {
    bool finite = true;
    for (int signal = 0; signal < width; ++signal) {
      double total = 0;
      for (std::int64_t block = 0; block < blocks; ++block) total += partial[(sample_index * blocks + block) * kSignals + signal];
      const float value = static_cast<float>(total);
      finite = finite && std::isfinite(value);
      if (args.signals != nullptr) args.signals[sample_index * width + signal] = value;
    }
    if (args.flags != nullptr && !finite) args.flags[sample_index] = 1;
  }
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
    const SamplePlan plan = sample_plan(args, sample_index);
    run(args, plan, sample_index, begin, std::min(begin + kSignalBlock, args.size), &partial[task * kSignals]);
  }
  write_signals(args, partial, blocks);
}

}  // namespace amg
