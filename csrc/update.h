// One step of the tensors of one device: childtune_kernels/ops/update.py's Update, which says what each list means.
#pragma once

#include <cstdint>
#include <optional>
#include <vector>

#include "adamw.h"
#include "arrays.h"

namespace childtune {

using Keys = std::vector<int64_t>;
using MaybeTensor = std::optional<Tensor>;
using torch::stable::detail::to;

inline const float* maybe_data(const MaybeTensor& tensor) {
  return tensor ? static_cast<const float*>(tensor->const_data_ptr()) : nullptr;
}

// An update's arguments, in the order of its schema. Entry i of every list belongs to parameter i; lists from `indices` on
// may be empty.
struct UpdateLists {
  static constexpr uint64_t kArguments = 15;

  template <typename Rule>
  UpdateLists(Rule, const StableIValue* arguments)
      : rule(Rule::kRow),
        moments(Rule::kMoments),
        params(arguments[0], Access::kWrites),
        grads(arguments[1], Access::kReads),
        exp_avgs(arguments[2], Access::kWrites),
        exp_avg_sqs(arguments[3], Access::kWrites),
        steps(arguments[4], Access::kWrites),
        hyper(to<Tensor>(arguments[5])),
        table(read_array(hyper.get(), Access::kReads)),
        indices(arguments[6], Access::kReads),
        mask_words(arguments[7], Access::kReads),
        mask_keys(to<Keys>(arguments[8])),
        companions(arguments[9], Access::kWrites),
        rounding_keys(to<Keys>(arguments[10])),
        lrs(arguments[11], Access::kReads),
        grad_scale(to<MaybeTensor>(arguments[12])),
        found_inf(to<MaybeTensor>(arguments[13])),
        grad_norm(to<MaybeTensor>(arguments[14])) {}

  size_t size() const { return params.size(); }
  const Hyper& row(size_t i) const { return table.as<const Hyper>()[i]; }
  const float* lr(size_t i) const { return lrs.empty() ? nullptr : lrs[i].as<const float>(); }

  // Whether the child is all of parameter i: there are no indices then, but moments.
  bool is_whole(size_t i) const { return indices.empty() || (indices[i].numel == 0 && exp_avgs[i].numel != 0); }
  // Whether the gradient holds the child's elements alone. Where both readings fit they are the same.
  bool is_packed(size_t i) const { return grads[i].numel != params[i].numel && grads[i].numel == exp_avgs[i].numel; }
  // Whether F's mask is drawn.
  bool draws(size_t i) const { return !mask_keys.empty() && row(i).reserve_p < 1; }

  bool has_companion(size_t i) const { return !companions.empty() && companions[i].numel != 0; }
  bool is_master(size_t i) const { return has_companion(i) && companions[i].dtype == ScalarType::Float; }
  bool is_stochastic(size_t i) const {
    return !rounding_keys.empty() && !has_companion(i) && params[i].dtype != ScalarType::Float;
  }

  const int rule;     // its row in a table of rules
  const int moments;  // with one alone, there are no exp_avg_sqs
  Arrays params, grads, exp_avgs, exp_avg_sqs, steps;
  Tensor hyper;
  Array table;  // hyper's
  Arrays indices, mask_words;
  Keys mask_keys;
  Arrays companions;
  Keys rounding_keys;
  Arrays lrs;
  MaybeTensor grad_scale, found_inf, grad_norm;
};

}  // namespace childtune
