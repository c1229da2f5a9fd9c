// What the kernels use of the machine: the best instruction set that it has, unless TURBOSPARSE_ISA
// or `set_isa` names one, and a way to fetch ahead.
#include <atomic>
#include <cstdlib>
#include <stdexcept>

#ifdef TURBOSPARSE_X86
#include <cpuid.h>
#endif

#if defined(TURBOSPARSE_ARM) && defined(__linux__)
#include <asm/hwcap.h>
#include <sys/auxv.h>
#endif

#include "matrix.h"

namespace {

struct Isa {
  const char* name;
  bool (*available)();
  const KernelSet* kernels;
};

#ifdef TURBOSPARSE_X86
bool has_avx512() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
         __builtin_cpu_supports("avx512vnni");
}

// clang before 16 does not know "f16c" in __builtin_cpu_supports.
bool has_f16c() {
  unsigned a, b, c = 0, d;
  return __get_cpuid(1, &a, &b, &c, &d) && c & bit_F16C;
}
#endif

#ifdef TURBOSPARSE_ARM
bool has_dot_products() {
#ifdef __linux__
  return getauxval(AT_HWCAP) & HWCAP_ASIMDDP;
#else
  return true;  // Apple's all have them
#endif
}
#endif

constexpr Isa kIsas[] = {
#ifdef TURBOSPARSE_X86
    {"avx512vbmi", [] { return has_avx512() && __builtin_cpu_supports("avx512vbmi"); },
     &avx512vbmi_kernels},
    {"avx512", has_avx512, &avx512_kernels},
    {"avx2",
     [] { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c(); },
     &avx2_kernels},
#endif
#ifdef TURBOSPARSE_ARM
    {"neon", has_dot_products, &neon_kernels},
#endif
    {"ref", [] { return true; }, &reference_kernels},
};

std::atomic<const Isa*> in_use{nullptr};

std::atomic<Fetching> together{{FETCH_STREAM, 1, 8 << 10}}, scattered{{FETCH_ASIDE, 1, 8 << 10}};

const Isa& find(const char* name) {
  std::string available;
  for (const Isa& isa : kIsas) {
    if (!isa.available()) continue;
    if (std::string(name) == isa.name) return isa;
    available += (available.empty() ? "" : ", ") + std::string(isa.name);
  }
  throw std::invalid_argument("the instruction set (TURBOSPARSE_ISA) is '" + std::string(name) +
                              "', this machine has " + available);
}

const Isa& current() {
  const Isa* isa = in_use.load(std::memory_order_relaxed);
  if (!isa) {
    const char* name = std::getenv("TURBOSPARSE_ISA");
    isa = &find(name ? name : available_isas().front().c_str());
    in_use.store(isa);
  }
  return *isa;
}

}  // namespace

std::vector<std::string> available_isas() {
  std::vector<std::string> names;
  for (const Isa& isa : kIsas) {
    if (isa.available()) names.push_back(isa.name);
  }
  return names;
}

std::string isa() { return current().name; }

void set_isa(const std::string& name) { in_use.store(&find(name.c_str())); }

const Kernels& kernels_of(Quant quant) { return current().kernels->of[quant]; }

Agreements agreements() { return current().kernels->agreements; }

void set_fetching(const Fetching& of_together, const Fetching& of_scattered) {
  together = of_together;
  scattered = of_scattered;
}

Rows rows_at(const void* data, int64_t stride, const int32_t* indices, int64_t count) {
  return {
      static_cast<const uint8_t*>(data), stride, indices, count, together.load(), scattered.load()};
}
