// cuda / device: whether the kernels can run on a device.
#pragma once

#include <string>

namespace saft {

// What stands in the way of running on this device: "" or the reason. The text of a driver error included.
std::string cuda_unavailable(int device);

}  // namespace saft
