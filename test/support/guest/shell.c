#include "shell.h"

#include <errno.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

#define MOST_OUTPUT 65536

static void print_escaped(FILE* from, FILE* out) {
  for (int c, count = 0; (c = fgetc(from)) != EOF; count++) {
    // Read to its end all the same, or the shell would die of the closed pipe.
    if (count >= MOST_OUTPUT || c == '\0') continue;
    if (c == '\n')
      fputs("\\n", out);
    else if (c == '\\')
      fputs("\\\\", out);
    else
      fputc(c, out);
  }
}

static void become_shell(const char* line, int output) {
  dup2(output, STDOUT_FILENO);
  dup2(output, STDERR_FILENO);
  execl("/bin/busybox", "sh", "-c", line, (char*)NULL);
  _exit(127);
}

void run_shell(const char* line, FILE* out) {
  FILE* output = tmpfile();
  if (!output) {
    fprintf(out, "error %s\n", strerror(errno));
    return;
  }
  int status = 0;
  pid_t child = fork();
  if (child == 0) become_shell(line, fileno(output));
  if (child < 0 || waitpid(child, &status, 0) != child) {
    fprintf(out, "error %s\n", strerror(errno));
  } else {
    fprintf(out, "ok %d ", WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status));
    rewind(output);
    print_escaped(output, out);
    fprintf(out, "\n");
  }
  fclose(output);
}
