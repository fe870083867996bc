/* A CUDA driver with one GPU, made of numbers; nothing runs on it. */
#include <stddef.h>
#include <stdio.h>

int cuInit(unsigned flags) { return (int)flags; }
int cuDriverGetVersion(int *version) { *version = CUDA; return 0; }
int cuDeviceGetCount(int *count) { *count = 1; return 0; }
int cuDeviceGet(int *device, int index) { *device = index; return 0; }
int cuDeviceGetName(char *text, int size, int device) {
  return snprintf(text, (size_t)size, "%s", NAME) >= size || device;
}
int cuDeviceTotalMem_v2(size_t *bytes, int device) {
  *bytes = (size_t)8 << 30;
  return device;
}
int cuDeviceGetAttribute(int *value, int attribute, int device) {
  switch (attribute) {
  case 16: *value = MULTIPROCESSORS; break;
  case 18: *value = INTEGRATED; break;
  case 75: *value = MAJOR; break;
  case 76: *value = MINOR; break;
  default: return 1;
  }
  return device;
}
int cuDevicePrimaryCtxGetState(int device, unsigned *flags, int *active) {
  *flags = 0;
  *active = 0;
  return device;
}
int cuGetErrorName(int status, const char **text) {
  (void)status;
  *text = "CUDA_ERROR_FAKE";
  return 0;
}
