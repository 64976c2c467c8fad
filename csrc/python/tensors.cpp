// What a step must know of its tensors before it may use their addresses, read in one loop: 393 tensors take some 10 us
// here and 150 us attribute by attribute in Python. Not on the stable ABI, which cannot look into a Python list of
// tensors: built for one torch, and replaced by childtune_kernels/ops/tensors.py where that is another.
#define PY_SSIZE_T_CLEAN
#include <torch/csrc/autograd/python_variable.h>

#include <vector>

namespace {

// Calls visit(tensor) for every entry of a list; false, with a Python error set, where one is no tensor.
template <typename Visit>
bool for_each(PyObject* list, const Visit& visit) {
  if (!PyList_Check(list)) {
    PyErr_SetString(PyExc_TypeError, "tensors must be a list");
    return false;
  }
  for (Py_ssize_t i = 0; i < PyList_GET_SIZE(list); ++i) {
    PyObject* entry = PyList_GET_ITEM(list, i);
    if (!THPVariable_Check(entry)) {
      PyErr_Format(PyExc_TypeError, "tensors[%zd] must be a tensor, got %s", i, Py_TYPE(entry)->tp_name);
      return false;
    }
    try {
      visit(THPVariable_Unpack(entry));
    } catch (const std::exception& error) {
      PyErr_Format(PyExc_RuntimeError, "tensors[%zd]: %s", i, error.what());
      return false;
    }
  }
  return true;
}

PyObject* as_bytes(const std::vector<int64_t>& values) {
  return PyBytes_FromStringAndSize(
      reinterpret_cast<const char*>(values.data()), static_cast<Py_ssize_t>(values.size() * sizeof(int64_t)));
}

// forms(list) -> bytes, equal where dtypes, devices, layouts, signs, sizes and strides are.
PyObject* forms(PyObject*, PyObject* list) {
  std::vector<int64_t> form;
  const bool ok = for_each(list, [&](const at::Tensor& tensor) {
    const bool strided = tensor.layout() == at::kStrided;
    form.push_back(static_cast<int64_t>(tensor.scalar_type()));
    form.push_back(static_cast<int64_t>(tensor.device().type()) << 8 | (tensor.device().index() & 0xFF));
    form.push_back(static_cast<int64_t>(tensor.layout()) << 1 | tensor.is_neg());
    form.push_back(tensor.dim());
    for (const int64_t size : tensor.sizes()) form.push_back(size);
    if (!strided) return;
    for (const int64_t stride : tensor.strides()) form.push_back(stride);
  });
  return ok ? as_bytes(form) : nullptr;
}

// addresses(list) -> bytes of int64.
PyObject* addresses(PyObject*, PyObject* list) {
  std::vector<int64_t> result;
  const bool ok = for_each(list, [&](const at::Tensor& tensor) {
    result.push_back(reinterpret_cast<int64_t>(tensor.data_ptr()));
  });
  return ok ? as_bytes(result) : nullptr;
}

PyMethodDef methods[] = {{"forms", forms, METH_O, nullptr}, {"addresses", addresses, METH_O, nullptr}, {}};
PyModuleDef module = {PyModuleDef_HEAD_INIT, CHILDTUNE_MODULE, nullptr, -1, methods};

}  // namespace

#define CHILDTUNE_CONCATENATE(a, b) a##b
#define CHILDTUNE_INIT(name) CHILDTUNE_CONCATENATE(PyInit_, name)
PyMODINIT_FUNC CHILDTUNE_INIT(CHILDTUNE_MODULE_NAME)() { return PyModule_Create(&module); }
