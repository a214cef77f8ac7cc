#pragma once

#include <stdio.h>

#include "disk.h"

/* Carries out one line of the protocol, and writes one line in answer: `ok` with `name=number`
   pairs, or `error` with what happened. guest.ts lists the commands. */
void obey(char* line, FILE* out);

/* Finds the disks, and tells the host their names and sizes: `ready vda=67108864`. */
void greet(FILE* out);
