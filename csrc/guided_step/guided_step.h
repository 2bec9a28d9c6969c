// Classifier-free guidance, the AMG terms and the scheduler update of one step; see kernels/guided_step/README.md.
#pragma once

#include <cstdint>

#include "dtype.h"

namespace amg {

constexpr int kMaxStates = 3;
enum StepInput { kSample, kOutput, kClipped, kNoise, kStepInputs };     // what a new state is made of
enum NetworkTensor { kUncond, kCond, kNeighbour, kGradient, kNetworkTensors };  // numbered by `rows`, in its order

// Tensors are contiguous, [batch, size]; those that may be missing are null. Buffers that are null are not written.
struct GuidedStepArgs {
  const void* sample;
  const void* network[kNetworkTensors];  // of network_dtype, the gradient of grad_dtype; [counts[i], size]
  const float* similarity;               // [batch]; null closes every gate
  const void* noise;
  const float* coefficients;    // `width` a row, in the order of STEP_COEFFICIENTS
  const std::int32_t* rows;     // [4, batch], a row of each network tensor a sample, any values; null: the sample's own
  float* state;                 // [states, batch, size]
  const float* output_scale;    // [batch]
  void* prev_sample;            // null: without the update, three signals; may be `sample`
  void* x0_hat;
  float* signals;               // [batch, 4], or [batch, 3] where prev_sample is null
  std::int32_t* flags;          // [batch]
  std::int64_t counts[kNetworkTensors];
  std::int64_t batch, size;
  std::int64_t width, coefficient_stride;  // 10 or 42; 0 (one row for all) or width
  int states;
  DType dtype, network_dtype, grad_dtype;
  int num_threads;
  bool stream = false;  // float outputs too large for the caches, aligned, of whole vectors: written past them

  // Ten coefficients and nothing else: the loop that every plain step runs.
  bool narrow() const { return width == 10 && output_scale == nullptr; }
};

// What one sample's gate, similarity and row numbers make of its coefficient row. A term of weight 0 is not read.
struct SamplePlan {
  float k_sample, k_eps, k_noise, root, inv_root_alpha;
  float guidance;  // s0 - s1, or s0 where the gate is closed; NaN where the sample's outputs shall be
  float caption;   // s2
  float push;      // c3 * sqrt(1 - alpha_bar) / e_output
  std::int64_t row[kNetworkTensors];  // -1: not read, m_u = m_c
  bool noise;                         // read
  // Of the wide loop alone:
  float output_scale, a, b, clip, k_clipped, e_sample, e_output, scale, next_scale;
  float h[kMaxStates], A[kMaxStates][kMaxStates], B[kMaxStates][kStepInputs];
  bool state[kMaxStates];  // read
};

constexpr std::int64_t kSignalBlock = 4096;  // elements of one unit of work; its signals are summed apart

// Computes elements [begin, end) of one sample and writes the block's four partial signals.
using GuidedStepBlock = void (*)(const GuidedStepArgs&, const SamplePlan&, std::int64_t sample_index,
                                 std::int64_t begin, std::int64_t end, double* partial_signals);

void guided_step(const GuidedStepArgs& args);

SamplePlan sample_plan(const GuidedStepArgs& args, std::int64_t sample_index);

namespace scalar { void guided_step_block(const GuidedStepArgs&, const SamplePlan&, std::int64_t, std::int64_t, std::int64_t, double*); }
namespace avx2 { void guided_step_block(const GuidedStepArgs&, const SamplePlan&, std::int64_t, std::int64_t, std::int64_t, double*); }
namespace avx512 { void guided_step_block(const GuidedStepArgs&, const SamplePlan&, std::int64_t, std::int64_t, std::int64_t, double*); }

}  // namespace amg
