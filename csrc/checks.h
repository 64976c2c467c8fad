// What every op demands of its arguments, on CPU and CUDA alike, before anything is written. Messages name the
// argument, the expected and the received value.
#pragma once

#include <sstream>
#include <stdexcept>
#include <string>

#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include "adamw.h"
#include "bitmask.h"
#include "ops.h"
#include "rounding.h"
#include "score.h"

namespace childtune {

using torch::headeronly::ScalarType;

// The arguments that all updates share.
struct UpdateLists {
  const Tensors &params, &grads, &exp_avgs, &exp_avg_sqs, &steps;
  const Tensor& hyper;
  const Tensors& lrs;
  const MaybeTensor &grad_scale, &found_inf, &grad_norm;

  const Hyper& hyper_row(size_t i) const { return static_cast<const Hyper*>(hyper.const_data_ptr())[i]; }
};

template <typename... Parts>
[[noreturn]] void refuse(const Parts&... parts) {
  std::ostringstream message;
  (message << ... << parts);
  throw std::runtime_error(message.str());
}

inline std::string at(const char* list, size_t i) { return std::string(list) + "[" + std::to_string(i) + "]"; }

inline bool is_weight_dtype(ScalarType dtype) {
  return dtype == ScalarType::Float || dtype == ScalarType::BFloat16 || dtype == ScalarType::Half;
}

// Calls run(T{}) with the C++ type of a dtype that is_weight_dtype.
template <typename Run>
void dispatch_weights(ScalarType dtype, const Run& run) {
  if (dtype == ScalarType::Float) return run(float{});
  if (dtype == ScalarType::BFloat16) return run(c10::BFloat16(0.0f));
  return run(c10::Half(0.0f));
}

// A contiguous tensor of one dtype, length and device: what every kernel's plain pointer stands for.
template <typename Name>
void check_array(const Name& name, const Tensor& tensor, ScalarType dtype, int64_t numel, const Tensor& like) {
  if (tensor.scalar_type() != dtype)
    refuse(name(), " must be ", toString(dtype), ", got ", toString(tensor.scalar_type()));
  if (tensor.numel() != numel) refuse(name(), " must have ", numel, " elements, got ", tensor.numel());
  if (!tensor.is_contiguous()) refuse(name(), " must be contiguous");
  if (!(tensor.device() == like.device())) refuse(name(), " must be on the device of the other tensors");
}

inline void check_length(const char* name, size_t length, size_t expected) {
  if (length != expected) refuse(name, " must have ", expected, " entries, one a parameter, got ", length);
}

inline void check_weight_dtype(const char* list, size_t i, const Tensor& tensor) {
  if (is_weight_dtype(tensor.scalar_type())) return;
  refuse(at(list, i), " must be Float, BFloat16 or Half, got ", toString(tensor.scalar_type()));
}

// Whether all of parameter i is in the child: there are no indices then, but moments.
inline bool is_whole(const UpdateLists& u, const Tensors& indices, size_t i) {
  return indices[i].numel() == 0 && u.exp_avgs[i].numel() != 0;
}

// Whether the gradient of parameter i holds the child's elements alone. Where both readings fit they are the same.
inline bool is_packed(const UpdateLists& u, size_t i) {
  return u.grads[i].numel() != u.params[i].numel() && u.grads[i].numel() == u.exp_avgs[i].numel();
}

// `indices`: of adamw_compact_, else null.
inline void check_update(const UpdateLists& u, const Tensors* indices = nullptr) {
  const size_t n = u.params.size();
  check_length("grads", u.grads.size(), n);
  check_length("exp_avgs", u.exp_avgs.size(), n);
  check_length("exp_avg_sqs", u.exp_avg_sqs.size(), n);
  check_length("steps", u.steps.size(), n);
  if (!u.lrs.empty()) check_length("lrs", u.lrs.size(), n);
  if (indices) check_length("indices", indices->size(), n);
  const bool is_table = u.hyper.scalar_type() == ScalarType::Double && u.hyper.is_cpu() && u.hyper.is_contiguous();
  if (!is_table || u.hyper.numel() != static_cast<int64_t>(n) * kHyperColumns)
    refuse("hyper must be a contiguous Double CPU tensor of ", n, " x ", kHyperColumns, ", got ", u.hyper.numel(),
           " elements of ", toString(u.hyper.scalar_type()));
  for (size_t i = 0; i < n; ++i) {
    const Tensor& param = u.params[i];
    const auto check = [&](const char* list, const Tensors& tensors, ScalarType dtype, int64_t numel) {
      check_array([&] { return at(list, i); }, tensors[i], dtype, numel, u.params[0]);
    };
    check_weight_dtype("params", i, param);
    check_weight_dtype("exp_avgs", i, u.exp_avgs[i]);
    check("params", u.params, param.scalar_type(), param.numel());
    int64_t moments = param.numel();
    if (indices && !is_whole(u, *indices, i)) {
      moments = (*indices)[i].numel();
      check("indices", *indices, ScalarType::Int, moments);
      if (moments > param.numel() || param.numel() >> 31 != 0)
        refuse(at("indices", i), " must index a tensor of fewer than 2**31 elements, got ", moments, " for ",
               param.numel());
    }
    check("grads", u.grads, param.scalar_type(), is_packed(u, i) ? moments : param.numel());
    check("exp_avgs", u.exp_avgs, u.exp_avgs[i].scalar_type(), moments);
    check("exp_avg_sqs", u.exp_avg_sqs, u.exp_avgs[i].scalar_type(), moments);
    check("steps", u.steps, ScalarType::Double, 1);
    if (!u.lrs.empty()) check("lrs", u.lrs, ScalarType::Float, 1);
  }
  const auto check_scalar = [&](const char* name, const MaybeTensor& value) {
    if (value && n != 0) check_array([&] { return name; }, *value, ScalarType::Float, 1, u.params[0]);
  };
  check_scalar("grad_scale", u.grad_scale);
  check_scalar("found_inf", u.found_inf);
  check_scalar("grad_norm", u.grad_norm);
}

// How 16-bit weights are kept: see the schemas' `companions` and `rounding_keys`; both lists may be empty.
struct LowPrecision {
  const Tensors& companions;
  const std::vector<int64_t>& rounding_keys;

  bool has_companion(size_t i) const { return !companions.empty() && companions[i].numel() != 0; }
  bool is_master(size_t i) const { return has_companion(i) && companions[i].scalar_type() == ScalarType::Float; }
  bool is_stochastic(const UpdateLists& u, size_t i) const {
    return !rounding_keys.empty() && !has_companion(i) && u.params[i].scalar_type() != ScalarType::Float;
  }
};

inline void check_low_precision(const UpdateLists& u, const LowPrecision& low) {
  if (!low.companions.empty()) check_length("companions", low.companions.size(), u.params.size());
  if (!low.rounding_keys.empty()) check_length("rounding_keys", low.rounding_keys.size(), u.params.size());
  for (size_t i = 0; i < low.companions.size(); ++i) {
    if (!low.has_companion(i)) continue;
    const ScalarType own = u.params[i].scalar_type();
    if (own == ScalarType::Float) refuse(at("companions", i), " must have no elements for a Float weight");
    const ScalarType dtype = low.is_master(i) ? ScalarType::Float : own;
    check_array([&] { return at("companions", i); }, low.companions[i], dtype, u.exp_avgs[i].numel(), u.params[0]);
  }
}

inline void check_probability(double p) {
  if (!(p >= 1.0 / 4294967296.0 && p <= 1.0)) refuse("p must be in [2**-32, 1], got ", p);
}

inline void check_keys(const UpdateLists& u, const std::vector<int64_t>& keys) {
  check_length("keys", keys.size(), u.params.size());
  for (size_t i = 0; i < keys.size(); ++i) check_probability(u.hyper_row(i).reserve_p);
}

inline void check_mask_words(const UpdateLists& u, const Tensors& mask_words) {
  check_length("mask_words", mask_words.size(), u.params.size());
  for (size_t i = 0; i < mask_words.size(); ++i) {
    const int64_t expected = mask_words[i].numel() == 0 ? 0 : words_for(u.params[i].numel());
    check_array([&] { return at("mask_words", i); }, mask_words[i], ScalarType::Int, expected, u.params[0]);
  }
}

inline void check_accumulate(const Tensors& accumulators, const Tensors& grads) {
  if (grads.size() != accumulators.size())
    refuse("grads must have ", accumulators.size(), " entries, got ", grads.size());
  for (size_t i = 0; i < grads.size(); ++i) {
    check_weight_dtype("grads", i, grads[i]);
    const auto check = [&](const char* list, const Tensor& tensor, ScalarType dtype) {
      check_array([&] { return at(list, i); }, tensor, dtype, accumulators[i].numel(), accumulators[0]);
    };
    check("accumulators", accumulators[i], ScalarType::Float);
    check("grads", grads[i], grads[i].scalar_type());
  }
}

inline void check_bernoulli(const Tensor& words, int64_t numel, int64_t step, double p, int64_t domain,
                            int64_t offset) {
  if (numel < 0) refuse("numel must be at least 0, got ", numel);
  if (offset < 0 || offset % 4 != 0) refuse("offset must be a multiple of 4 and at least 0, got ", offset);
  if (step < 1 || step >> 32 != 0) refuse("step must be in [1, 2**32), got ", step);
  if (domain < 0 || domain >> 32 != 0) refuse("domain must be in [0, 2**32), got ", domain);
  check_probability(p);
  check_array([] { return "words"; }, words, ScalarType::Int, words_for(numel), words);
}

inline void check_scores(const Tensors& scores, const char* name, size_t length) {
  if (length != scores.size()) refuse(name, " must have ", scores.size(), " entries, one a tensor, got ", length);
  for (size_t i = 0; i < scores.size(); ++i) {
    check_weight_dtype("scores", i, scores[i]);
    check_array([&] { return at("scores", i); }, scores[i], scores[i].scalar_type(), scores[i].numel(), scores[0]);
  }
}

inline void check_histogram(const Tensors& scores, const std::vector<int64_t>& firsts, int64_t shift, int64_t digits) {
  check_scores(scores, "firsts", firsts.size());
  if (digits < 0 || digits > kMaxDigits || shift < 0 || shift >= 32 || shift + digits > 32)
    refuse("digits must be in [0, ", kMaxDigits, "], shift in [0, 32) and their sum at most 32, got ", digits, " and ",
           shift);
  for (size_t i = 0; i < firsts.size(); ++i) {
    if (firsts[i] < 0 || firsts[i] > (int64_t{1} << 32) - (int64_t{1} << (shift + digits)))
      refuse(at("firsts", i), " must be in [0, 2**32 - 2**", shift + digits, "], got ", firsts[i]);
  }
}

inline void check_thresholds(const Tensors& scores, const std::vector<double>& thresholds,
                             const std::vector<int64_t>& tie_ends) {
  check_scores(scores, "thresholds", thresholds.size());
  check_scores(scores, "tie_ends", tie_ends.size());
  for (size_t i = 0; i < tie_ends.size(); ++i) {
    if (tie_ends[i] < 0) refuse(at("tie_ends", i), " must be at least 0, got ", tie_ends[i]);
  }
}

// Where each tensor's packed bits start in a buffer of all, and where the last one's end.
inline std::vector<int64_t> first_words(const Tensors& tensors) {
  std::vector<int64_t> starts{0};
  for (const Tensor& tensor : tensors) starts.push_back(starts.back() + words_for(tensor.numel()));
  return starts;
}

inline void check_words(const Tensor& words) {
  check_array([] { return "words"; }, words, ScalarType::Int, words.numel(), words);
}

inline void check_overlap(const Tensor& a, const Tensor& b) {
  check_array([] { return "a"; }, a, ScalarType::Int, a.numel(), a);
  check_array([] { return "b"; }, b, ScalarType::Int, a.numel(), a);
}

}  // namespace childtune
