// cpu / parallel: the one place that speaks OpenMP.
#pragma once

#include <algorithm>
#include <cfenv>
#include <exception>

#include "common.h"

#if defined(_OPENMP)
#include <omp.h>
#endif

namespace saft {

// Calls fn(item, thread) for every item in [0, num_items), in any order, `thread` in [0, num_threads).
// Items are handed out in runs of `run` as threads come free. The first exception thrown is rethrown here
// (OpenMP would terminate the process). Every thread computes in the caller's floating-point environment:
// with torch.set_flush_denormal(True), which holds for one thread, results would depend on the schedule.
template <class Fn>
void parallel_for(index_t num_items, index_t run, int num_threads, const Fn& fn) {
  const index_t num_runs = ceil_div(num_items, run);
  const int threads = int(std::min<index_t>(num_threads, num_runs));
#if defined(_OPENMP)
  if (threads > 1) {
    std::exception_ptr error;
    std::fenv_t caller;
    std::fegetenv(&caller);
#pragma omp parallel num_threads(threads)
    {
      std::fenv_t own;
      std::fegetenv(&own);
      std::fesetenv(&caller);
      const int thread = omp_get_thread_num();
#pragma omp for schedule(dynamic, 1)
      for (index_t r = 0; r < num_runs; ++r) {
        try {
          const index_t end = std::min(num_items, (r + 1) * run);
          for (index_t item = r * run; item < end; ++item) fn(item, thread);
        } catch (...) {
#pragma omp critical(saft_parallel_for_error)
          if (!error) error = std::current_exception();
        }
      }
      std::fesetenv(&own);
    }
    if (error) std::rethrow_exception(error);
    return;
  }
#endif
  (void)threads;
  for (index_t item = 0; item < num_items; ++item) fn(item, 0);
}

}  // namespace saft
