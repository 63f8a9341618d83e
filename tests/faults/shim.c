/* A disk that fails, or a process that dies, at the n-th call that changes a file below one folder.

   Preloaded (LD_PRELOAD), it stands between a process and libc, so whatever changes files comes through here: Python, torch's
   C++, safetensors' and tokenizers' Rust, Arrow. Nothing is counted until `faults_arm`, which a child of a warm process
   calls through ctypes. Paths are compared as they are given, so the folder is named without links.

   DIES       the process is killed; of a write that is the n-th, half is written first
   an errno   that call and all later ones fail with it: ENOSPC and EDQUOT those that need room, the others all. Of a write
              that is the first to fail for want of room, half is written: so does a disk that fills up. */

#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/sendfile.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

enum { COUNTS = 0, DIES = -1 };
enum { GOES = 0, HALF = -2 };

static char root[PATH_MAX];
static size_t root_length;
static long fault_at;
static int fault = COUNTS, told = -1;
static atomic_int armed;
static atomic_long calls;
static atomic_int struck;

void faults_arm(const char *folder, long at, int what, int tell) {
    snprintf(root, sizeof root, "%s", folder);
    root_length = strlen(root);
    fault_at = at, fault = what, told = tell;
    calls = 0;
    struck = 0;
    armed = 1;
}

long faults_count(void) { return calls; }

void faults_disarm(void) { armed = 0; }

static void die(void) {
    syscall(SYS_kill, getpid(), SIGKILL);
    for (;;) pause();
}

/* The absolute path that a call names, by a folder's descriptor and a path in it, or (path NULL) by its own descriptor. */
static int whole(int folder, const char *path, char *out) {
    if (path && path[0] == '/') return snprintf(out, PATH_MAX, "%s", path) < PATH_MAX;
    char link[64];
    if (folder == AT_FDCWD) {
        if (!getcwd(out, PATH_MAX)) return 0;
    } else {
        snprintf(link, sizeof link, "/proc/self/fd/%d", folder);
        ssize_t n = readlink(link, out, PATH_MAX - 1);
        if (n < 0) return 0;
        out[n] = 0;
    }
    if (!path) return 1;
    size_t n = strlen(out);
    return (size_t)snprintf(out + n, PATH_MAX - n, "/%s", path) < PATH_MAX - n;
}

/* What becomes of a call: GOES, HALF of it and then as `fault` says, or the errno that it fails with. */
static int fate(const char *call, int folder, const char *path, int room, int divisible) {
    if (!armed) return GOES;
    int kept = errno;
    char place[PATH_MAX];
    int mine = whole(folder, path, place) && !strncmp(place, root, root_length) &&
               (place[root_length] == '/' || !place[root_length]);
    errno = kept;
    if (!mine) return GOES;
    long n = ++calls;
    if (fault == COUNTS || n < fault_at) return GOES;
    int full = fault == ENOSPC || fault == EDQUOT;
    if (full && !room) return GOES;
    int at_first = !atomic_exchange(&struck, 1);
    if (at_first && told >= 0) dprintf(told, "%s %s\n", call, place + root_length);
    errno = kept;
    if (fault == DIES) {
        if (!divisible) die();
        return HALF;
    }
    return full && at_first && divisible ? HALF : fault;
}

#define REAL(name) ({ static __typeof__(&name) real; if (!real) real = (__typeof__(&name))dlsym(RTLD_NEXT, #name); real; })

/* A call that happens, or fails. */
#define CALL(result, name, arguments, given, folder, path, room, failed)                              \
    result name arguments {                                                                          \
        int wrong = fate(#name, folder, path, room, 0);                                              \
        if (wrong) return errno = wrong, failed;                                                     \
        return REAL(name) given;                                                                     \
    }

/* A write, of which a part may happen. */
#define WRITE(name, arguments, given, half, fd, size)                                                \
    ssize_t name arguments {                                                                         \
        int wrong = fate(#name, fd, NULL, 1, (size) > 1);                                            \
        if (wrong == HALF) {                                                                         \
            ssize_t done = REAL(name) half;                                                          \
            if (fault == DIES) die();                                                                \
            return done;                                                                             \
        }                                                                                            \
        if (wrong) return errno = wrong, -1;                                                         \
        return REAL(name) given;                                                                     \
    }

#define CHANGES(flags) ((flags) & (O_WRONLY | O_RDWR | O_CREAT | O_TRUNC))

static int absent(int folder, const char *path) {
    int kept = errno, no = faccessat(folder, path, F_OK, AT_SYMLINK_NOFOLLOW) != 0;
    errno = kept;
    return no;
}

#define OPEN(name, folder, arguments, given)                                                         \
    int name arguments {                                                                             \
        mode_t mode = 0;                                                                             \
        if (flags & (O_CREAT | __O_TMPFILE)) {                                                       \
            va_list more;                                                                            \
            va_start(more, flags);                                                                   \
            mode = va_arg(more, mode_t);                                                             \
            va_end(more);                                                                            \
        }                                                                                            \
        if (CHANGES(flags) && armed) {                                                               \
            int wrong = fate(#name, folder, path, (flags & O_CREAT) && absent(folder, path), 0);     \
            if (wrong) return errno = wrong, -1;                                                     \
        }                                                                                            \
        return REAL(name) given;                                                                     \
    }

OPEN(open, AT_FDCWD, (const char *path, int flags, ...), (path, flags, mode))
OPEN(open64, AT_FDCWD, (const char *path, int flags, ...), (path, flags, mode))
OPEN(openat, folder, (int folder, const char *path, int flags, ...), (folder, path, flags, mode))
OPEN(openat64, folder, (int folder, const char *path, int flags, ...), (folder, path, flags, mode))

CALL(int, creat, (const char *path, mode_t mode), (path, mode), AT_FDCWD, path, 1, -1)
CALL(int, creat64, (const char *path, mode_t mode), (path, mode), AT_FDCWD, path, 1, -1)

#define FOPEN(name)                                                                                  \
    FILE *name(const char *path, const char *mode) {                                                 \
        if (armed && strpbrk(mode, "wa+")) {                                                         \
            int wrong = fate(#name, AT_FDCWD, path, absent(AT_FDCWD, path), 0);                      \
            if (wrong) return errno = wrong, NULL;                                                   \
        }                                                                                            \
        return REAL(name)(path, mode);                                                               \
    }
FOPEN(fopen)
FOPEN(fopen64)

WRITE(write, (int fd, const void *from, size_t n), (fd, from, n), (fd, from, n / 2), fd, n)
WRITE(pwrite, (int fd, const void *from, size_t n, off_t at), (fd, from, n, at), (fd, from, n / 2, at), fd, n)
WRITE(pwrite64, (int fd, const void *from, size_t n, off64_t at), (fd, from, n, at), (fd, from, n / 2, at), fd, n)
WRITE(writev, (int fd, const struct iovec *v, int n), (fd, v, n), (fd, v, n / 2), fd, n)
WRITE(pwritev, (int fd, const struct iovec *v, int n, off_t at), (fd, v, n, at), (fd, v, n / 2, at), fd, n)
WRITE(pwritev64, (int fd, const struct iovec *v, int n, off64_t at), (fd, v, n, at), (fd, v, n / 2, at), fd, n)
WRITE(sendfile, (int fd, int from, off_t *at, size_t n), (fd, from, at, n), (fd, from, at, n / 2), fd, n)
WRITE(sendfile64, (int fd, int from, off64_t *at, size_t n), (fd, from, at, n), (fd, from, at, n / 2), fd, n)
WRITE(copy_file_range, (int from, off64_t *at, int fd, off64_t *to, size_t n, unsigned flags), (from, at, fd, to, n, flags),
      (from, at, fd, to, n / 2, flags), fd, n)

size_t fwrite(const void *from, size_t size, size_t n, FILE *file) {
    int wrong = armed ? fate("fwrite", fileno(file), NULL, 1, n > 1) : GOES;
    if (wrong == HALF) {
        size_t done = REAL(fwrite)(from, size, n / 2, file);
        fflush(file);
        if (fault == DIES) die();
        return errno = fault, done;
    }
    if (wrong) return errno = wrong, 0;
    return REAL(fwrite)(from, size, n, file);
}

CALL(int, rename, (const char *from, const char *to), (from, to), AT_FDCWD, to, 0, -1)
CALL(int, renameat, (int a, const char *from, int b, const char *to), (a, from, b, to), b, to, 0, -1)
CALL(int, renameat2, (int a, const char *from, int b, const char *to, unsigned f), (a, from, b, to, f), b, to, 0, -1)
CALL(int, unlink, (const char *path), (path), AT_FDCWD, path, 0, -1)
CALL(int, unlinkat, (int folder, const char *path, int flags), (folder, path, flags), folder, path, 0, -1)
CALL(int, rmdir, (const char *path), (path), AT_FDCWD, path, 0, -1)
CALL(int, mkdir, (const char *path, mode_t mode), (path, mode), AT_FDCWD, path, 1, -1)
CALL(int, mkdirat, (int folder, const char *path, mode_t mode), (folder, path, mode), folder, path, 1, -1)
CALL(int, link, (const char *from, const char *to), (from, to), AT_FDCWD, to, 1, -1)
CALL(int, linkat, (int a, const char *from, int b, const char *to, int f), (a, from, b, to, f), b, to, 1, -1)
CALL(int, symlink, (const char *from, const char *to), (from, to), AT_FDCWD, to, 1, -1)
CALL(int, symlinkat, (const char *from, int folder, const char *to), (from, folder, to), folder, to, 1, -1)
CALL(int, fsync, (int fd), (fd), fd, NULL, 0, -1)
CALL(int, fdatasync, (int fd), (fd), fd, NULL, 0, -1)
CALL(int, ftruncate, (int fd, off_t n), (fd, n), fd, NULL, 0, -1)
CALL(int, ftruncate64, (int fd, off64_t n), (fd, n), fd, NULL, 0, -1)
CALL(int, truncate, (const char *path, off_t n), (path, n), AT_FDCWD, path, 0, -1)
CALL(int, truncate64, (const char *path, off64_t n), (path, n), AT_FDCWD, path, 0, -1)
CALL(int, posix_fallocate, (int fd, off_t at, off_t n), (fd, at, n), fd, NULL, 1, wrong)
CALL(int, posix_fallocate64, (int fd, off64_t at, off64_t n), (fd, at, n), fd, NULL, 1, wrong)
CALL(int, fallocate, (int fd, int mode, off_t at, off_t n), (fd, mode, at, n), fd, NULL, 1, -1)
CALL(int, fallocate64, (int fd, int mode, off64_t at, off64_t n), (fd, mode, at, n), fd, NULL, 1, -1)
CALL(int, chmod, (const char *path, mode_t mode), (path, mode), AT_FDCWD, path, 0, -1)
CALL(int, fchmod, (int fd, mode_t mode), (fd, mode), fd, NULL, 0, -1)
CALL(int, fchmodat, (int folder, const char *path, mode_t mode, int f), (folder, path, mode, f), folder, path, 0, -1)
CALL(int, utimensat, (int folder, const char *path, const struct timespec t[2], int f), (folder, path, t, f), folder, path, 0, -1)

#define MMAP(name, offset)                                                                           \
    void *name(void *at, size_t n, int protection, int flags, int fd, offset from) {                 \
        if (armed && fd >= 0 && (flags & MAP_SHARED) && (protection & PROT_WRITE)) {                 \
            int wrong = fate(#name, fd, NULL, 0, 0);                                                 \
            if (wrong) return errno = wrong, MAP_FAILED;                                             \
        }                                                                                            \
        return REAL(name)(at, n, protection, flags, fd, from);                                       \
    }
MMAP(mmap, off_t)
MMAP(mmap64, off64_t)
