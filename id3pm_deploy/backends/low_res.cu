// Pictures of a base model to what a super-resolution model enlarges: the 8-bit levels
// that images.to_uint8 makes (clipped, in double precision, half to even), and of them
// what enlarging.low_res_from_pixels makes, in single precision. The intrinsics keep
// the compiler from fusing or approximating, so that the result is bit for bit theirs.
//
// Compiled to low_res.ptx by tests/cuda_ptx.py.

extern "C" __global__ void low_res_from_pictures(
    const float *pictures, float *low_res, unsigned long long count)
{
    unsigned long long i = (unsigned long long)blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= count)
        return;
    float x = fminf(fmaxf(pictures[i], -1.0f), 1.0f);
    double level = rint(__dmul_rn(__dadd_rn((double)x, 1.0), 127.5));
    low_res[i] = __fsub_rn(__fdiv_rn((float)level, 127.5f), 1.0f);
}
