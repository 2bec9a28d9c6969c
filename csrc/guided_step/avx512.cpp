#include "simd/avx512.h"

#include "guided_step/body.h"

namespace amg::avx512 {

void guided_step_block(const GuidedStepArgs& args, const SamplePlan& plan, std::int64_t sample_index,
                       std::int64_t begin, std::int64_t end, double* partial_signals) {
  any_block<Avx512Vec>(args, plan, sample_index, begin, end, partial_signals);
}

}  // namespace amg::avx512
