// What stands between an op's arguments and a plain pointer, on CPU and CUDA alike, before anything is written: numbers
// of entries and elements, dtypes, devices, strides. What arguments mean, Python has checked: childtune_kernels/ops/.
// Messages name the argument, the expected and the received value.
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

// An argument, or an entry of one that is a list.
struct Name {
  const char* argument;
  size_t entry = SIZE_MAX;
};

inline std::ostream& operator<<(std::ostream& out, const Name& name) {
  out << name.argument;
  if (name.entry != SIZE_MAX) out << "[" << name.entry << "]";
  return out;
}

template <typename... Parts>
[[noreturn]] void refuse(const Parts&... parts) {
  std::ostringstream message;
  (message << ... << parts);
  throw std::runtime_error(message.str());
}

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

inline void check_weight_dtype(Name name, ScalarType dtype) {
  if (!is_weight_dtype(dtype)) refuse(name, " must be Float, BFloat16 or Half, got ", toString(dtype));
}

inline bool same_device(const Array& a, const Array& b) {
  return a.device_type == b.device_type && a.device_index == b.device_index;
}

inline void check_memory(Name name, const Array& array) {
  if (!array.data && array.numel != 0) refuse(name, " must have memory, got a storage that was given back");
}

// A contiguous array of one dtype, length and device: what every kernel's plain pointer stands for.
inline void check_array(Name name, const Array& array, ScalarType dtype, int64_t numel, const Array& like) {
  if (array.dtype != dtype) refuse(name, " must be ", toString(dtype), ", got ", toString(array.dtype));
  if (array.numel != numel) refuse(name, " must have ", numel, " elements, got ", array.numel);
  if (!array.is_contiguous) refuse(name, " must be contiguous");
  check_memory(name, array);
  if (!same_device(array, like)) refuse(name, " must be on the device of the other tensors");
}

inline Array array_of(const Tensor& tensor) { return read_array(tensor.get(), Access::kReads); }

inline void check_array(Name name, const Tensor& tensor, ScalarType dtype, int64_t numel, const Tensor& like) {
  check_array(name, array_of(tensor), dtype, numel, array_of(like));
}

inline void check_length(const char* name, size_t length, size_t expected) {
  if (length != expected) refuse(name, " must have ", expected, " entries, one a parameter, got ", length);
}

inline void check_lengths(const UpdateLists& lists) {
  const auto check_optional = [&](const char* name, size_t length) {
    if (length != 0) check_length(name, length, lists.size());
  };
  check_length("grads", lists.grads.size(), lists.size());
  check_length("exp_avgs", lists.exp_avgs.size(), lists.size());
  check_length("exp_avg_sqs", lists.exp_avg_sqs.size(), lists.moments == 2 ? lists.size() : 0);
  check_length("steps", lists.steps.size(), lists.size());
  check_optional("indices", lists.indices.size());
  check_optional("mask_words", lists.mask_words.size());
  check_optional("mask_keys", lists.mask_keys.size());
  check_optional("companions", lists.companions.size());
  check_optional("rounding_keys", lists.rounding_keys.size());
  check_optional("lrs", lists.lrs.size());
  const Array& table = lists.table;
  const bool is_table = table.dtype == ScalarType::Double && table.is_contiguous && lists.hyper.is_cpu();
  if (!is_table || table.numel != static_cast<int64_t>(lists.size()) * kHyperColumns)
    refuse("hyper must be a contiguous Double CPU tensor of ", lists.size(), " x ", kHyperColumns, ", got ",
           table.numel, " elements of ", toString(table.dtype));
  check_memory({"hyper"}, table);
}

inline void check_entries(const UpdateLists& lists, size_t i) {
  const Array &param = lists.params[i], &exp_avg = lists.exp_avgs[i];
  const auto check = [&](const char* list, const Array& array, ScalarType dtype, int64_t numel) {
    check_array({list, i}, array, dtype, numel, lists.params[0]);
  };
  check_weight_dtype({"params", i}, param.dtype);
  check_weight_dtype({"exp_avgs", i}, exp_avg.dtype);
  check("params", param, param.dtype, param.numel);
  int64_t moments = param.numel;
  if (!lists.is_whole(i)) {
    moments = lists.indices[i].numel;
    check("indices", lists.indices[i], ScalarType::Int, moments);
    if (moments > param.numel || param.numel >> 31 != 0)
      refuse(Name{"indices", i}, " must index a tensor of fewer than 2**31 elements, got ", moments, " for ",
             param.numel);
  }
  check("grads", lists.grads[i], param.dtype, lists.is_packed(i) ? moments : param.numel);
  check("exp_avgs", exp_avg, exp_avg.dtype, moments);
  if (lists.moments == 2) check("exp_avg_sqs", lists.exp_avg_sqs[i], exp_avg.dtype, moments);
  check("steps", lists.steps[i], ScalarType::Double, 1);
  if (!lists.mask_words.empty()) {
    const Array& words = lists.mask_words[i];
    check("mask_words", words, ScalarType::Int, words.numel == 0 ? 0 : words_for(param.numel));
  }
  if (lists.has_companion(i)) {
    if (param.dtype == ScalarType::Float)
      refuse(Name{"companions", i}, " must have no elements for a Float weight");
    check("companions", lists.companions[i], lists.is_master(i) ? ScalarType::Float : param.dtype, moments);
  }
  if (!lists.lrs.empty()) check("lrs", lists.lrs[i], ScalarType::Float, 1);
}

inline void check_update(const UpdateLists& lists) {
  check_lengths(lists);
  for (size_t i = 0; i < lists.size(); ++i) check_entries(lists, i);
  const auto check_scalar = [&](const char* name, const MaybeTensor& value) {
    if (value && lists.size() != 0) check_array({name}, array_of(*value), ScalarType::Float, 1, lists.params[0]);
  };
  check_scalar("grad_scale", lists.grad_scale);
  check_scalar("found_inf", lists.found_inf);
  check_scalar("grad_norm", lists.grad_norm);
}

inline void check_accumulate(const Tensors& accumulators, const Tensors& grads) {
  if (grads.size() != accumulators.size())
    refuse("grads must have ", accumulators.size(), " entries, got ", grads.size());
  for (size_t i = 0; i < grads.size(); ++i) {
    const int64_t numel = accumulators[i].numel();
    check_weight_dtype({"grads", i}, grads[i].scalar_type());
    check_array({"accumulators", i}, accumulators[i], ScalarType::Float, numel, accumulators[0]);
    check_array({"grads", i}, grads[i], grads[i].scalar_type(), numel, accumulators[0]);
  }
}

inline void check_bernoulli(const Tensor& words, int64_t numel) {
  check_array({"words"}, words, ScalarType::Int, words_for(numel), words);
}

inline void check_scores(const Tensors& scores, const char* name, size_t length) {
  if (length != scores.size()) refuse(name, " must have ", scores.size(), " entries, one a tensor, got ", length);
  for (size_t i = 0; i < scores.size(); ++i) {
    check_weight_dtype({"scores", i}, scores[i].scalar_type());
    check_array({"scores", i}, scores[i], scores[i].scalar_type(), scores[i].numel(), scores[0]);
  }
}

// Bins are counted in arrays of fixed size.
inline void check_histogram(const Tensors& scores, const std::vector<int64_t>& firsts, int64_t shift, int64_t digits) {
  check_scores(scores, "firsts", firsts.size());
  if (digits < 0 || digits > kMaxDigits || shift < 0 || shift >= 32 || shift + digits > 32)
    refuse("digits must be in [0, ", kMaxDigits, "], shift in [0, 32) and their sum at most 32, got ", digits, " and ",
           shift);
}

inline void check_thresholds(const Tensors& scores, const std::vector<double>& thresholds,
                             const std::vector<int64_t>& tie_ends) {
  check_scores(scores, "thresholds", thresholds.size());
  check_scores(scores, "tie_ends", tie_ends.size());
}

// Where each tensor's packed bits start in a buffer of all, and where the last one's end.
inline std::vector<int64_t> first_words(const Tensors& tensors) {
  std::vector<int64_t> starts{0};
  for (const Tensor& tensor : tensors) starts.push_back(starts.back() + words_for(tensor.numel()));
  return starts;
}

inline void check_words(const Tensor& words) {
  check_array({"words"}, words, ScalarType::Int, words.numel(), words);
}

inline void check_overlap(const Tensor& a, const Tensor& b) {
  check_array({"a"}, a, ScalarType::Int, a.numel(), a);
  check_array({"b"}, b, ScalarType::Int, a.numel(), a);
}

}  // namespace childtune
