#include "simd/avx2.h"

#include "guided_step/body.h"

namespace amg::avx2 {

void guided_step_block(const GuidedStepArgs& args, const SamplePlan& plan, std::int64_t sample_index,
                       std::int64_t begin, std::int64_t end, double* partial_signals) {
  any_block<Avx2Vec>(args, plan, sample_index, begin, end, partial_signals);
}

}  // namespace amg::avx2
