// topk_magnitude.cpp with the tiles that GPUs work on.
#define SAFT_CUDA_TILE_NUMEL 8192
#include "topk_magnitude.cpp"
