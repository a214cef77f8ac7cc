/* The first process of a guest under test: loads the drivers, then obeys the host. */

#include <dirent.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "commands.h"

static void mount_all(void) {
  static const char* const mounts[][2] = {
      {"/dev", "devtmpfs"}, {"/proc", "proc"}, {"/sys", "sysfs"}, {"/tmp", "tmpfs"}};
  for (unsigned i = 0; i < sizeof mounts / sizeof *mounts; i++) {
    mkdir(mounts[i][0], 0755);
    if (mount("none", mounts[i][0], mounts[i][1], 0, NULL) != 0) perror(mounts[i][0]);
  }
}

/* /modules/00-virtio_ring.ko and so on: their names sort as they depend. */
static void load_modules(void) {
  struct dirent** names;
  int count = scandir("/modules", &names, NULL, alphasort);
  for (int i = 0; i < count; i++) {
    char path[300];
    if (names[i]->d_name[0] == '.') continue;
    snprintf(path, sizeof path, "/modules/%s", names[i]->d_name);
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0 || syscall(SYS_finit_module, fd, "", 0) != 0) perror(path);
    close(fd);
  }
}

static int open_port(void) {
  int port = -1;
  DIR* folder = opendir("/dev");
  for (struct dirent* entry; folder && port < 0 && (entry = readdir(folder));) {
    char path[300];
    if (strncmp(entry->d_name, "vport", 5) != 0) continue;
    snprintf(path, sizeof path, "/dev/%s", entry->d_name);
    port = open(path, O_RDWR | O_CLOEXEC);
  }
  if (folder) closedir(folder);
  return port;
}

/* The port comes some time after its driver, and its node before it can be opened. */
static int wait_for_port(void) {
  for (;; usleep(10000)) {
    int port = open_port();
    if (port >= 0) return port;
  }
}

static void use_console(void) {
  int console = open("/dev/ttyS0", O_RDWR | O_NOCTTY);
  for (int fd = STDIN_FILENO; console >= 0 && fd <= STDERR_FILENO; fd++) dup2(console, fd);
  if (console > STDERR_FILENO) close(console);
}

int main(void) {
  mount_all();
  use_console();
  setenv("PATH", "/bin", 1);
  load_modules();
  int channel = wait_for_port();
  FILE* in = fdopen(channel, "r");
  FILE* out = fdopen(dup(channel), "w");
  if (!in || !out) {
    perror("channel");
    return 1;
  }
  greet(out);
  fflush(out);
  char* line = NULL;
  for (size_t size = 0;;) {
    if (getline(&line, &size, in) > 0) {
      obey(line, out);
      fflush(out);
    } else {
      // Nobody is connected at the host's end.
      clearerr(in);
      usleep(10000);
    }
  }
}
