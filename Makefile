# Tests that `pytest` alone does not run: PYTHON312 has JAX 0.11 or newer, whose Mosaic GPU interpreter
# runs the GPU kernels on a CPU and raises where threads race.
PYTHON312 ?= python3.12

.PHONY: test-312
test-312:
	JAX_PLATFORMS=cpu $(PYTHON312) -m pytest -n0 -m 'slow or not slow' \
	  tests/kernels/test_gpu_interpreted.py tests/kernels/test_gpu_forms.py
