// Tensors as the ops use them: plain pointers beside what they stand for. Everything is asked for once: a question to
// torch's stable ABI is a call into its library, and a step asks about thousands of tensors.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/core/ScalarType.h>

namespace childtune {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

enum class Access { kReads, kWrites };

struct Array {
  void* data;  // null where there are no elements
  int64_t numel;
  ScalarType dtype;
  bool is_contiguous;
  int32_t device_type, device_index;  // in torch's numbers

  template <typename T>
  T* as() const {
    return static_cast<T*>(data);
  }
};

// Tensor::scalar_type() asks for the number of one dtype after the other, eight of them before float64's.
inline ScalarType dtype_of(int32_t number) {
  struct Known {
    int32_t number;
    ScalarType dtype;
  };
  static const Known known[] = {{aoti_torch_dtype_float32(), ScalarType::Float},
                                {aoti_torch_dtype_float64(), ScalarType::Double},
                                {aoti_torch_dtype_int32(), ScalarType::Int},
                                {aoti_torch_dtype_bfloat16(), ScalarType::BFloat16},
                                {aoti_torch_dtype_float16(), ScalarType::Half}};
  for (const Known& candidate : known) {
    if (candidate.number == number) return candidate.dtype;
  }
  return torch::stable::detail::to<ScalarType>(torch::stable::detail::from(number));
}

inline Array read_array(AtenTensorHandle tensor, Access access) {
  Array array;
  int32_t dtype;
  const void* data;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(tensor, &dtype));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_numel(tensor, &array.numel));
  TORCH_ERROR_CODE_CHECK(aoti_torch_is_contiguous(tensor, &array.is_contiguous));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(tensor, &array.device_type));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(tensor, &array.device_index));
  if (access == Access::kWrites) {
    TORCH_ERROR_CODE_CHECK(torch_get_mutable_data_ptr(tensor, &array.data));
  } else {
    TORCH_ERROR_CODE_CHECK(torch_get_const_data_ptr(tensor, &data));
    array.data = const_cast<void*>(data);
  }
  array.dtype = dtype_of(dtype);
  return array;
}

// A list of tensors as an op receives it, held as long as this lives. Tensor would allocate a counter for each: adamw_
// of 393 parameters of one element takes 0.23 ms so, and would take 0.29 (one core of a Xeon).
class Arrays {
 public:
  Arrays(StableIValue list, Access access) {
    take(torch::stable::detail::to<StableListHandle>(list));
    arrays_.reserve(held_.size());
    for (const Handle& tensor : held_) arrays_.push_back(read_array(tensor.get(), access));
  }
  Arrays(const Arrays&) = delete;
  Arrays& operator=(const Arrays&) = delete;

  size_t size() const { return arrays_.size(); }
  bool empty() const { return arrays_.empty(); }
  const Array& operator[](size_t i) const { return arrays_[i]; }

  Tensor tensor(size_t i) const {
    AtenTensorHandle another;
    TORCH_ERROR_CODE_CHECK(aoti_torch_new_tensor_handle(held_[i].get(), &another));
    return Tensor(another);
  }

 private:
  struct Release {
    void operator()(AtenTensorHandle tensor) const { aoti_torch_delete_tensor_object(tensor); }
  };
  using Handle = std::unique_ptr<AtenTensorOpaque, Release>;

  // Owns the list's tensors from here on; what held them together is given back.
  void take(StableListHandle list) {
    const std::unique_ptr<StableListOpaque, AOTITorchError (*)(StableListHandle)> owned(list, torch_delete_list);
    size_t size;
    TORCH_ERROR_CODE_CHECK(torch_list_size(list, &size));
    held_.reserve(size);
    for (size_t i = 0; i < size; ++i) {
      StableIValue tensor;
      TORCH_ERROR_CODE_CHECK(torch_list_get_item(list, i, &tensor));
      held_.emplace_back(torch::stable::detail::to<AtenTensorHandle>(tensor));
    }
  }

  std::vector<Handle> held_;
  std::vector<Array> arrays_;
};

}  // namespace childtune
