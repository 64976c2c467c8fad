// The updates: check, derive the scalars, advance the step counters, and run one parallel loop over the lists.
#include "../adamw.h"

#include "../checks.h"
#include "parallel.h"

namespace childtune {
namespace {

const float* maybe_data(const MaybeTensor& tensor) {
  return tensor ? static_cast<const float*>(tensor->const_data_ptr()) : nullptr;
}

// Advances every step counter and returns what the new step needs; nothing, and no change, on overflow or empty lists.
std::vector<Scalars> begin_step(const UpdateLists& u) {
  const float* found_inf = maybe_data(u.found_inf);
  std::vector<Scalars> scalars;
  if (u.params.empty() || (found_inf && *found_inf != 0)) return scalars;
  for (size_t i = 0; i < u.params.size(); ++i) {
    auto* step = static_cast<double*>(u.steps[i].mutable_data_ptr());
    const float* lr = u.lrs.empty() ? nullptr : static_cast<const float*>(u.lrs[i].const_data_ptr());
    scalars.push_back(derive_scalars(next_step(*step), u.hyper_row(i), lr, maybe_data(u.grad_scale), maybe_data(u.grad_norm)));
    *step += 1;
  }
  return scalars;
}

Parameter arrays(const UpdateLists& u, size_t i, const Scalars& scalars) {
  Parameter p{};
  p.param = u.params[i].mutable_data_ptr();
  p.grad = u.grads[i].const_data_ptr();
  p.exp_avg = u.exp_avgs[i].mutable_data_ptr();
  p.exp_avg_sq = u.exp_avg_sqs[i].mutable_data_ptr();
  p.weight_dtype = u.params[i].scalar_type();
  p.moment_dtype = u.exp_avgs[i].scalar_type();
  p.scalars = &scalars;
  return p;
}

std::vector<Stream> make_streams(
    const std::vector<Scalars>& scalars, const std::vector<int64_t>& keys, uint32_t domain) {
  std::vector<Stream> streams;
  for (size_t i = 0; i < scalars.size() && !keys.empty(); ++i)
    streams.push_back(make_stream(keys[i], scalars[i].t, domain));
  return streams;
}

// `complete(i, parameter)` adds what is particular to one op.
template <typename Loop, typename Complete>
void run(const UpdateLists& u, const LowPrecision& low, const std::vector<Scalars>& scalars, Loop loop,
         const Complete& complete) {
  const std::vector<Stream> rounding = make_streams(scalars, low.rounding_keys, kStochasticRounding);
  std::vector<Parameter> parameters;
  std::vector<int64_t> numels;
  for (size_t i = 0; i < scalars.size(); ++i) {
    parameters.push_back(arrays(u, i, scalars[i]));
    Parameter& p = parameters.back();
    if (low.has_companion(i)) (low.is_master(i) ? p.master : p.compensation) = low.companions[i].mutable_data_ptr();
    if (low.is_stochastic(u, i)) p.rounding = &rounding[i];
    complete(i, p);
    numels.push_back(u.exp_avgs[i].numel());
  }
  parallel_elements(numels, [&](size_t i, int64_t first, int64_t last) { loop(parameters[i], first, last); });
}

}  // namespace

void adamw_(const Tensors& params, const Tensors& grads, const Tensors& exp_avgs, const Tensors& exp_avg_sqs,
            const Tensors& steps, const Tensor& hyper, const Tensors& companions,
            const std::vector<int64_t>& rounding_keys, const Tensors& lrs, const MaybeTensor& grad_scale,
            const MaybeTensor& found_inf, const MaybeTensor& grad_norm) {
  const UpdateLists u{params, grads, exp_avgs, exp_avg_sqs, steps, hyper, lrs, grad_scale, found_inf, grad_norm};
  const LowPrecision low{companions, rounding_keys};
  check_update(u);
  check_low_precision(u, low);
  run(u, low, begin_step(u), loops().adamw, [](size_t, Parameter&) {});
}

void adamw_bernoulli_(const Tensors& params, const Tensors& grads, const Tensors& exp_avgs,
                      const Tensors& exp_avg_sqs, const Tensors& steps, const Tensor& hyper,
                      const std::vector<int64_t>& keys, const Tensors& companions,
                      const std::vector<int64_t>& rounding_keys, const Tensors& lrs, const MaybeTensor& grad_scale,
                      const MaybeTensor& found_inf, const MaybeTensor& grad_norm) {
  const UpdateLists u{params, grads, exp_avgs, exp_avg_sqs, steps, hyper, lrs, grad_scale, found_inf, grad_norm};
  const LowPrecision low{companions, rounding_keys};
  check_update(u);
  check_keys(u, keys);
  check_low_precision(u, low);
  const std::vector<Scalars> scalars = begin_step(u);
  const std::vector<Stream> streams = make_streams(scalars, keys, kGradientMask);
  run(u, low, scalars, loops().adamw_bernoulli, [&](size_t i, Parameter& p) { p.stream = &streams[i]; });
}

void adamw_masked_(const Tensors& params, const Tensors& grads, const Tensors& exp_avgs, const Tensors& exp_avg_sqs,
                   const Tensors& steps, const Tensor& hyper, const Tensors& mask_words, bool decay_all,
                   const Tensors& lrs, const MaybeTensor& grad_scale, const MaybeTensor& found_inf,
                   const MaybeTensor& grad_norm) {
  const UpdateLists u{params, grads, exp_avgs, exp_avg_sqs, steps, hyper, lrs, grad_scale, found_inf, grad_norm};
  check_update(u);
  check_mask_words(u, mask_words);
  run(u, {{}, {}}, begin_step(u), loops().adamw_masked, [&](size_t i, Parameter& p) {
    if (mask_words[i].numel() != 0) p.mask_words = static_cast<const uint32_t*>(mask_words[i].const_data_ptr());
    p.decay_all = decay_all;
  });
}

void adamw_compact_(const Tensors& params, const Tensors& grads, const Tensors& exp_avgs,
                    const Tensors& exp_avg_sqs, const Tensors& steps, const Tensor& hyper, const Tensors& indices,
                    const std::vector<int64_t>& keys, const Tensors& companions,
                    const std::vector<int64_t>& rounding_keys, const Tensors& lrs, const MaybeTensor& grad_scale,
                    const MaybeTensor& found_inf, const MaybeTensor& grad_norm) {
  const UpdateLists u{params, grads, exp_avgs, exp_avg_sqs, steps, hyper, lrs, grad_scale, found_inf, grad_norm};
  const LowPrecision low{companions, rounding_keys};
  check_update(u, &indices);
  check_keys(u, keys);
  check_low_precision(u, low);
  const std::vector<Scalars> scalars = begin_step(u);
  const std::vector<Stream> streams = make_streams(scalars, keys, kGradientMask);
  run(u, low, scalars, loops().adamw_compact, [&](size_t i, Parameter& p) {
    p.stream = u.hyper_row(i).reserve_p < 1 ? &streams[i] : nullptr;
    p.indices = is_whole(u, indices, i) ? nullptr : static_cast<const int32_t*>(indices[i].const_data_ptr());
    p.grad_packed = is_packed(u, i);
  });
}

}  // namespace childtune
