// The check of adapter_ext/snapshot.py, which says what a snapshot is. It runs for every adapter of
// a batch in every layer; written in Python it takes longer than the op.

#pragma once

#include <pybind11/pybind11.h>

namespace adapter_ext {

// The fields of a snapshot, in their order.
enum SnapshotField {
  kKind,
  kOwnKeys,
  kOwnValues,
  kEmpty,
  kObjects,
  kTypes,
  kDicts,
  kKeys,
  kValues,
  kChildren,
  kLayers,
  kParameters,
  kNames,
  kSnapshotFields
};

namespace snapshot_internal {

// Items of tuples, which are borrowed: Python keeps the snapshots for as long as this runs.
class Items {
 public:
  Items(PyObject* snapshot, SnapshotField field) : tuple_(PyTuple_GET_ITEM(snapshot, field)) {
    if (!PyTuple_Check(tuple_)) throw pybind11::type_error("a field of a snapshot is no tuple");
  }
  Py_ssize_t size() const { return PyTuple_GET_SIZE(tuple_); }
  PyObject* operator[](Py_ssize_t i) const { return PyTuple_GET_ITEM(tuple_, i); }
  PyObject* dict(Py_ssize_t i) const {
    if (!PyDict_Check((*this)[i])) throw pybind11::type_error("a snapshot lacks a dict");
    return (*this)[i];
  }
  void match(const Items& other) const {
    if (size() != other.size()) throw pybind11::type_error("fields of a snapshot differ in length");
  }

 private:
  PyObject* tuple_;
};

// The value of a key, null where there is none or None.
inline PyObject* lookup(PyObject* dict, PyObject* key) {
  PyObject* value = PyDict_GetItemWithError(dict, key);
  if (!value && PyErr_Occurred()) throw pybind11::error_already_set();
  return value == Py_None ? nullptr : value;
}

inline bool has(PyObject* dict, PyObject* key, PyObject* value) {
  return lookup(dict, key) == (value == Py_None ? nullptr : value);
}

inline bool holds(PyObject* module, PyObject* snapshot) {
  if (reinterpret_cast<PyObject*>(Py_TYPE(module)) != PyTuple_GET_ITEM(snapshot, kKind)) {
    return false;
  }
  const Items own_keys(snapshot, kOwnKeys), own_values(snapshot, kOwnValues);
  own_keys.match(own_values);
  if (own_keys.size() > 0) {
    const auto own =
        pybind11::reinterpret_steal<pybind11::object>(PyObject_GenericGetDict(module, nullptr));
    if (!own) throw pybind11::error_already_set();
    for (Py_ssize_t i = 0; i < own_keys.size(); ++i) {
      if (!has(own.ptr(), own_keys[i], own_values[i])) return false;
    }
  }
  const Items empty(snapshot, kEmpty);
  for (Py_ssize_t i = 0; i < empty.size(); ++i) {
    if (PyDict_Size(empty.dict(i)) != 0) return false;
  }
  const Items objects(snapshot, kObjects), types(snapshot, kTypes);
  objects.match(types);
  for (Py_ssize_t i = 0; i < objects.size(); ++i) {
    if (reinterpret_cast<PyObject*>(Py_TYPE(objects[i])) != types[i]) return false;
  }
  const Items dicts(snapshot, kDicts), keys(snapshot, kKeys), values(snapshot, kValues);
  dicts.match(keys);
  dicts.match(values);
  for (Py_ssize_t i = 0; i < dicts.size(); ++i) {
    if (!has(dicts.dict(i), keys[i], values[i])) return false;
  }
  const Items children(snapshot, kChildren), layers(snapshot, kLayers);
  children.match(layers);
  for (Py_ssize_t i = 0; i < children.size(); ++i) {
    PyObject* own = layers[i];
    if (!PyTuple_Check(own)) throw pybind11::type_error("layers of a snapshot are no tuple");
    PyObject* layer;
    Py_ssize_t count = 0, position = 0;
    if (PyDict_Size(children.dict(i)) != PyTuple_GET_SIZE(own)) return false;
    while (PyDict_Next(children.dict(i), &position, nullptr, &layer)) {
      if (layer != PyTuple_GET_ITEM(own, count++)) return false;
    }
  }
  return true;
}

}  // namespace snapshot_internal

// The parameters that the snapshots name, in one list; None where something is no longer as it was.
inline pybind11::object read_parameters(const pybind11::list& modules,
                                        const pybind11::list& snapshots) {
  using namespace snapshot_internal;
  if (modules.size() != snapshots.size()) {
    throw pybind11::type_error("expected as many snapshots as modules");
  }
  pybind11::list result;
  for (std::size_t m = 0; m < modules.size(); ++m) {
    PyObject* snapshot = PyList_GET_ITEM(snapshots.ptr(), m);
    if (!PyTuple_Check(snapshot) || PyTuple_GET_SIZE(snapshot) != kSnapshotFields) {
      throw pybind11::type_error("expected snapshots");
    }
    if (!holds(PyList_GET_ITEM(modules.ptr(), m), snapshot)) return pybind11::none();
    const Items parameters(snapshot, kParameters), names(snapshot, kNames);
    parameters.match(names);
    for (Py_ssize_t i = 0; i < parameters.size(); ++i) {
      PyObject* parameter = lookup(parameters.dict(i), names[i]);
      if (!parameter) return pybind11::none();
      result.append(pybind11::handle(parameter));
    }
  }
  return result;
}

}  // namespace adapter_ext
