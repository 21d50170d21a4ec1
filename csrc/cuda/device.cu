#include "cuda/device.h"
#include "cuda/primitives.h"

namespace saft {

std::string cuda_unavailable(int device) {
  int count = 0, major = 0, minor = 0, driver = 0;
  cudaError_t error = cudaGetDeviceCount(&count);
  if (error == cudaSuccess && count == 0) return "no NVIDIA GPU is visible";
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
  if (error == cudaSuccess) error = cudaDriverGetVersion(&driver);
  if (error != cudaSuccess) {
    (void)cudaGetLastError();  // it is reported here
    return cudaGetErrorString(error);
  }
  if (kMaxArgumentBytes > 4096 && driver < 12010) {
    return "it needs driver 530 or newer, for kernel arguments above 4 KB";
  }
  if (major < 8) {
    return "it needs compute capability 8.0 or higher, got " + std::to_string(major) + "." +
           std::to_string(minor);
  }
  return "";
}

}  // namespace saft
