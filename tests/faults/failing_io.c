/* Lets one write or read of regular files below a folder fail: preloaded by tests.faults.campaign.

   The calls are counted over a process and all that it forks. A write is whatever brings bytes
   into a file: write, pwrite, writev, sendfile, copy_file_range, fsync; a read likewise. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <limits.h>
#include <stdatomic.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/sendfile.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

enum kind { WRITES, READS };
enum outcome { PASS, HALF, FAIL };
/* What happens to the n-th call, and to all that follow it. */
static const enum outcome AT[] = {FAIL, FAIL, HALF, HALF};
static const enum outcome AFTER[] = {FAIL, PASS, FAIL, PASS};

static char root[PATH_MAX];
static long fail_at;
static int fail_errno, fail_mode, fail_kind, armed;
static atomic_long *calls;

void fault_arm(const char *folder, long n, int error, int mode, int kind) {
  if (!calls)
    calls = mmap(NULL, 2 * sizeof *calls, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1,
                 0);
  atomic_store(&calls[WRITES], 0);
  atomic_store(&calls[READS], 0);
  snprintf(root, sizeof root, "%s/", folder);
  fail_at = n, fail_errno = error, fail_mode = mode, fail_kind = kind, armed = 1;
}

long fault_calls(int kind) { return atomic_load(&calls[kind]); }

static int is_below_root(int descriptor) {
  struct stat about;
  char link[64], path[PATH_MAX];
  if (fstat(descriptor, &about) || !S_ISREG(about.st_mode)) return 0;
  snprintf(link, sizeof link, "/proc/self/fd/%d", descriptor);
  ssize_t length = readlink(link, path, sizeof path - 1);
  return length > 0 && !strncmp(path, root, strlen(root));
}

static enum outcome decide(int descriptor, enum kind kind) {
  if (!armed) return PASS;
  int before = errno;
  int is_counted = is_below_root(descriptor);
  errno = before;
  if (!is_counted) return PASS;
  long call = atomic_fetch_add(&calls[kind], 1) + 1;
  if ((int)kind != fail_kind || fail_at < 1 || call < fail_at) return PASS;
  return call == fail_at ? AT[fail_mode] : AFTER[fail_mode];
}

/* The call NAME with its arguments, but for a count of bytes that may be halved. */
#define INTERPOSED(TYPE, NAME, PARAMETERS, TYPES, DESCRIPTOR, KIND, ARGUMENTS, HALVED)             \
  TYPE NAME PARAMETERS {                                                                           \
    static TYPE(*real) TYPES;                                                                      \
    if (!real) real = dlsym(RTLD_NEXT, #NAME);                                                     \
    switch (decide(DESCRIPTOR, KIND)) {                                                            \
      case FAIL: errno = fail_errno; return -1;                                                    \
      case HALF: return real HALVED;                                                               \
      default: return real ARGUMENTS;                                                              \
    }                                                                                              \
  }

#define HALF_OF(size) ((size) > 1 ? (size) / 2 : (size))

INTERPOSED(ssize_t, write, (int fd, const void *data, size_t size), (int, const void *, size_t),
           fd, WRITES, (fd, data, size), (fd, data, HALF_OF(size)))
INTERPOSED(ssize_t, pwrite, (int fd, const void *data, size_t size, off_t at),
           (int, const void *, size_t, off_t), fd, WRITES, (fd, data, size, at),
           (fd, data, HALF_OF(size), at))
INTERPOSED(ssize_t, pwrite64, (int fd, const void *data, size_t size, off64_t at),
           (int, const void *, size_t, off64_t), fd, WRITES, (fd, data, size, at),
           (fd, data, HALF_OF(size), at))
INTERPOSED(ssize_t, writev, (int fd, const struct iovec *parts, int count),
           (int, const struct iovec *, int), fd, WRITES, (fd, parts, count),
           (fd, parts, HALF_OF(count)))
INTERPOSED(ssize_t, sendfile, (int out, int in, off_t *at, size_t size),
           (int, int, off_t *, size_t), out, WRITES, (out, in, at, size),
           (out, in, at, HALF_OF(size)))
INTERPOSED(ssize_t, sendfile64, (int out, int in, off64_t *at, size_t size),
           (int, int, off64_t *, size_t), out, WRITES, (out, in, at, size),
           (out, in, at, HALF_OF(size)))
INTERPOSED(ssize_t, copy_file_range,
           (int in, off64_t *from, int out, off64_t *to, size_t size, unsigned flags),
           (int, off64_t *, int, off64_t *, size_t, unsigned), out, WRITES,
           (in, from, out, to, size, flags), (in, from, out, to, HALF_OF(size), flags))
INTERPOSED(int, fsync, (int fd), (int), fd, WRITES, (fd), (fd))
INTERPOSED(int, fdatasync, (int fd), (int), fd, WRITES, (fd), (fd))
INTERPOSED(ssize_t, read, (int fd, void *data, size_t size), (int, void *, size_t), fd, READS,
           (fd, data, size), (fd, data, HALF_OF(size)))
INTERPOSED(ssize_t, pread, (int fd, void *data, size_t size, off_t at),
           (int, void *, size_t, off_t), fd, READS, (fd, data, size, at),
           (fd, data, HALF_OF(size), at))
INTERPOSED(ssize_t, pread64, (int fd, void *data, size_t size, off64_t at),
           (int, void *, size_t, off64_t), fd, READS, (fd, data, size, at),
           (fd, data, HALF_OF(size), at))
INTERPOSED(ssize_t, readv, (int fd, const struct iovec *parts, int count),
           (int, const struct iovec *, int), fd, READS, (fd, parts, count),
           (fd, parts, HALF_OF(count)))
