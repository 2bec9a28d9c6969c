// Classifier-free guidance, the AMG terms and the scheduler update of one step; see kernels/guided_step/README.md.
#pragma once

#include <cstdint>

#include "dtype.h"

namespace amg {

// Tensors are contiguous, [batch, size]; optional ones are null.
struct GuidedStepArgs {
  const void* sample;
  const void* eps_uncond;
  const void* eps_cond;
  const void* eps_neighbour;
  const void* similarity_grad;  // of grad_dtype: the tensors' dtype or f32
  const float* similarity;      // [batch], finite; null closes every gate
  const void* noise;
  const float* coefficients;        // ten a row, in the order of COEFFICIENTS
  std::int64_t coefficient_stride;  // 0 (one row for all) or 10
  void* prev_sample;                // null: only x0_hat of the CFG estimate and three signals
  void* x0_hat;
  float* signals;  // [batch, 4], or [batch, 3] where prev_sample is null
  std::int64_t batch;
  std::int64_t size;
  DType dtype;
  DType grad_dtype;
  int num_threads;
  bool stream = false;  // float outputs too large for the caches, aligned, of whole vectors: written past them
};

// What one sample's gate and similarity make of its coefficient row.
struct SampleScales {
  float k_sample, k_eps, k_noise, root, inv_root_alpha;
  float guidance;  // s0 - s1, or s0 where the gate is closed
  float caption;   // s2
  float push;      // c3 * sqrt(1 - alpha_bar)
  bool open;
};

constexpr std::int64_t kSignalBlock = 4096;  // elements of one unit of work; its signals are summed apart

// Computes elements [begin, end) of one sample and writes the block's four partial signals.
using GuidedStepBlock = void (*)(const GuidedStepArgs&, const SampleScales&, std::int64_t sample_index,
                                 std::int64_t begin, std::int64_t end, double* partial_signals);

void guided_step(const GuidedStepArgs& args);

namespace scalar { void guided_step_block(const GuidedStepArgs&, const SampleScales&, std::int64_t, std::int64_t, std::int64_t, double*); }
namespace avx2 { void guided_step_block(const GuidedStepArgs&, const SampleScales&, std::int64_t, std::int64_t, std::int64_t, double*); }
namespace avx512 { void guided_step_block(const GuidedStepArgs&, const SampleScales&, std::int64_t, std::int64_t, std::int64_t, double*); }

}  // namespace amg
