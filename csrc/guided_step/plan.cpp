// Reads one sample's coefficient row, similarity and row numbers.
#include <algorithm>
#include <cmath>
#include <limits>

#include "guided_step/guided_step.h"

namespace amg {
namespace {

constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

// A number outside its tensor, whatever it is, counts as -1.
std::int64_t row_of(const GuidedStepArgs& args, int tensor, std::int64_t sample_index) {
  if (args.network[tensor] == nullptr) return -1;
  if (args.rows == nullptr) return sample_index;
  const std::int64_t row = args.rows[tensor * args.batch + sample_index];
  return row >= 0 && row < args.counts[tensor] ? row : -1;
}

void plan_rows(const GuidedStepArgs& args, std::int64_t sample_index, SamplePlan& plan) {
  for (int tensor = 0; tensor < kNetworkTensors; ++tensor) plan.row[tensor] = row_of(args, tensor, sample_index);
  if (plan.caption == 0) plan.row[kNeighbour] = -1;
  if (plan.push == 0) plan.row[kGradient] = -1;
  if (plan.row[kCond] < 0) {
    plan.row[kCond] = 0;
    plan.guidance = kNan;
  }
}

void plan_gate(const GuidedStepArgs& args, const float* row, std::int64_t sample_index, SamplePlan& plan) {
  if (args.similarity == nullptr) return;
  const float similarity = args.similarity[sample_index], threshold = row[5], s0 = row[6], c1 = row[7], c2 = row[8];
  if (!std::isfinite(similarity)) plan.guidance = kNan;
  if (!(similarity > threshold)) return;
  const float s1 = std::max(std::min(c1 * similarity, s0 - 1.0f), 0.0f);
  plan.guidance -= s1;
  plan.caption = std::max(std::min(c2 * similarity, s0 - s1 - 1.0f), 0.0f);
  plan.push = row[9] * row[3];
  if (plan.push != 0) plan.push /= plan.e_output;
}

void plan_wide(const float* row, int states, SamplePlan& plan) {
  plan.a = row[10], plan.b = row[11], plan.clip = row[12], plan.k_clipped = row[13];
  plan.e_sample = row[14], plan.e_output = row[15], plan.scale = row[16], plan.next_scale = row[17];
  for (int i = 0; i < states; ++i) {
    plan.h[i] = row[18 + i];
    plan.state[i] = plan.h[i] != 0;
    for (int j = 0; j < states; ++j) plan.A[i][j] = row[21 + kMaxStates * i + j];
    for (int input = 0; input < kStepInputs; ++input) plan.B[i][input] = row[30 + kStepInputs * i + input];
    plan.noise |= plan.B[i][kNoise] != 0;
  }
  for (int i = 0; i < states; ++i)
    for (int j = 0; j < states; ++j) plan.state[j] |= plan.A[i][j] != 0;
}

}  // namespace

SamplePlan sample_plan(const GuidedStepArgs& args, std::int64_t sample_index) {
  const float* row = args.coefficients + sample_index * args.coefficient_stride;
  SamplePlan plan{};
  plan.k_sample = row[0], plan.k_eps = row[1], plan.k_noise = row[2], plan.root = row[3], plan.inv_root_alpha = row[4];
  plan.noise = plan.k_noise != 0;
  plan.a = plan.inv_root_alpha, plan.b = -plan.root * plan.inv_root_alpha;
  plan.clip = std::numeric_limits<float>::infinity();
  plan.e_output = plan.scale = plan.next_scale = 1;
  if (args.width > 10) plan_wide(row, args.states, plan);
  plan.output_scale = args.output_scale == nullptr ? 1.0f : args.output_scale[sample_index];
  plan.guidance = plan.output_scale * row[6];
  plan_gate(args, row, sample_index, plan);
  plan_rows(args, sample_index, plan);
  plan.noise &= args.noise != nullptr;
  return plan;
}

}  // namespace amg
