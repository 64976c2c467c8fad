// The update: check, derive the scalars, advance the step counters, and run one parallel loop over the lists.
#include "../adamw.h"

#include "../checks.h"
#include "parallel.h"

namespace childtune {
namespace {

// Advances every step counter and returns what the new step needs; nothing, and no change, on overflow or empty lists.
std::vector<Scalars> begin_step(const UpdateLists& lists, const RuleLoops& rule) {
  const float* const found_inf = maybe_data(lists.found_inf);
  std::vector<Scalars> scalars;
  if (found_inf && *found_inf != 0) return scalars;
  const float* const grad_scale = maybe_data(lists.grad_scale);
  const float* const grad_norm = maybe_data(lists.grad_norm);
  scalars.reserve(lists.size());
  for (size_t i = 0; i < lists.size(); ++i) {
    double* const step = lists.steps[i].as<double>();
    scalars.push_back(rule.derive(next_step(*step), lists.row(i), lists.lr(i), grad_scale, grad_norm));
    *step += 1;
  }
  return scalars;
}

// One a parameter; none without keys.
std::vector<Stream> make_streams(const std::vector<Scalars>& scalars, const Keys& keys, uint32_t domain) {
  std::vector<Stream> streams;
  if (keys.empty()) return streams;
  streams.reserve(scalars.size());
  for (size_t i = 0; i < scalars.size(); ++i) streams.push_back(make_stream(keys[i], scalars[i].t, domain));
  return streams;
}

// All but the streams.
Parameter make_parameter(const UpdateLists& lists, size_t i, const Scalars& scalars) {
  Parameter p{};
  p.param = lists.params[i].data;
  p.grad = lists.grads[i].data;
  p.exp_avg = lists.exp_avgs[i].data;
  if (lists.moments == 2) p.exp_avg_sq = lists.exp_avg_sqs[i].data;
  p.weight_dtype = lists.params[i].dtype;
  p.moment_dtype = lists.exp_avgs[i].dtype;
  p.scalars = &scalars;
  if (lists.has_companion(i)) (lists.is_master(i) ? p.master : p.compensation) = lists.companions[i].data;
  if (!lists.is_whole(i)) p.indices = lists.indices[i].as<const int32_t>();
  if (!lists.mask_words.empty()) p.mask_words = lists.mask_words[i].as<const uint32_t>();
  p.decay_outside = lists.row(i).decay_outside != 0;
  p.grad_packed = lists.is_packed(i);
  return p;
}

}  // namespace

void update_(const UpdateLists& lists) {
  check_update(lists);
  const RuleLoops& rule = loops().rules[lists.rule];
  const std::vector<Scalars> scalars = begin_step(lists, rule);
  const std::vector<Stream> masking = make_streams(scalars, lists.mask_keys, kGradientMask);
  const std::vector<Stream> rounding = make_streams(scalars, lists.rounding_keys, kStochasticRounding);

  std::vector<Parameter> parameters;
  std::vector<int64_t> numels;
  parameters.reserve(scalars.size());
  numels.reserve(scalars.size());
  for (size_t i = 0; i < scalars.size(); ++i) {
    Parameter p = make_parameter(lists, i, scalars[i]);
    if (lists.draws(i)) p.stream = &masking[i];
    if (lists.is_stochastic(i)) p.rounding = &rounding[i];
    parameters.push_back(p);
    numels.push_back(lists.exp_avgs[i].numel);
  }
  parallel_elements(numels, [&](size_t i, int64_t first, int64_t last) { rule.update(parameters[i], first, last); });
}

}  // namespace childtune
