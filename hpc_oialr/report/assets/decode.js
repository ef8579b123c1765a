"use strict";

// Numbers that hpc_oialr/report/page/packing.py wrote.

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

/** Rows of a matrix of logarithms; what is absent is null, which breaks a line. */
function logarithmRows(packed, width) {
  const codes = new Uint16Array(bytesOf(packed.codes));
  const scale = (packed.high - packed.low) / 65534;
  const value = (code) => (code === 65535 ? null : Math.exp(packed.low + scale * code));
  return Array.from({ length: codes.length / width }, (_, row) =>
    Array.from(codes.subarray(row * width, (row + 1) * width), value),
  );
}

const RUNS = Array.from(document.querySelectorAll("script.run"), (block) => JSON.parse(block.textContent));
