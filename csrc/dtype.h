// Element types of the tensors: storage only, arithmetic is fp32.
#pragma once

#include <cstdint>

namespace amg {

enum class DType { f32 = 0, f16 = 1, bf16 = 2, u8 = 3 };

struct Half { std::uint16_t bits; };
struct BFloat { std::uint16_t bits; };
struct Byte { std::uint8_t value; };  // stands for value/255, rounded to fp32, which is what an image loader makes of it

}  // namespace amg
