"use strict";

// Numbers that hpc_oialr/report/page_data.py wrote.

function bytesOf(text) {
  const raw = atob(text);
  const bytes = new Uint8Array(raw.length);
  for (let i = 0; i < raw.length; i++) bytes[i] = raw.charCodeAt(i);
  return bytes.buffer;
}

/** Rows of a float32 matrix, views of one buffer. */
function rowsOf(text, width) {
  const flat = new Float32Array(bytesOf(text));
  return Array.from({ length: flat.length / width }, (_, row) => flat.subarray(row * width, (row + 1) * width));
}

/** The same as plain arrays; what is absent is null, which breaks a line. */
function rowsWithGaps(text, width) {
  return rowsOf(text, width).map((row) => Array.from(row, (value) => (Number.isNaN(value) ? null : value)));
}

const RUNS = Array.from(document.querySelectorAll("script.run"), (block) => JSON.parse(block.textContent));
