package main

import (
	"encoding/binary"
	"fmt"
	"os"
)

// makers make the images, each by its name. All are disks of 100 GiB of which a million clusters of 64 KiB are allocated.
var makers = map[string]func(path string) error{
	"big":          makeBig,
	"big-snapshot": makeBigSnapshot,
	"big-leaks": func(path string) error {
		return withBig(path, func(f *os.File) error { return eachRefcount(f, leak) })
	},
	"big-uncounted": func(path string) error {
		return withBig(path, func(f *os.File) error { return eachRefcount(f, forget) })
	},
}

func makeBig(path string) error {
	if err := command("qemu-img", "create", "-q", "-f", "qcow2", "-o", "preallocation=metadata", path, "62500M"); err != nil {
		return err
	}
	return command("qemu-img", "resize", "-q", path, "100G")
}

func makeBigSnapshot(path string) error {
	if err := makeBig(path); err != nil {
		return err
	}
	return command("qemu-img", "snapshot", "-c", "old", path)
}

func withBig(path string, damage func(*os.File) error) error {
	if err := makeBig(path); err != nil {
		return err
	}
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	return damage(f)
}

// leak has every cluster but those of the first refcount block counted once too often.
func leak(block int, counts []byte) {
	for i := 0; i < len(counts) && block > 0; i += 2 {
		if n := binary.BigEndian.Uint16(counts[i:]); n > 0 {
			binary.BigEndian.PutUint16(counts[i:], n+1)
		}
	}
}

// forget has every cluster but those of the first refcount block counted as free, as a crash with lazy refcounts does.
func forget(block int, counts []byte) {
	if block > 0 {
		clear(counts)
	}
}

// eachRefcount changes the refcount blocks of a default image: 64 KiB clusters, 16 bits.
func eachRefcount(f *os.File, change func(block int, counts []byte)) error {
	const cluster = 64 << 10
	head := make([]byte, 64)
	if _, err := f.ReadAt(head, 0); err != nil {
		return err
	}
	table := make([]byte, cluster)
	if _, err := f.ReadAt(table, int64(binary.BigEndian.Uint64(head[48:]))); err != nil {
		return err
	}
	block := make([]byte, cluster)
	for i := range cluster / 8 {
		at := int64(binary.BigEndian.Uint64(table[i*8:]))
		if at == 0 {
			continue
		}
		if _, err := f.ReadAt(block, at); err != nil {
			return fmt.Errorf("refcount block at %#x: %w", at, err)
		}
		change(i, block)
		if _, err := f.WriteAt(block, at); err != nil {
			return err
		}
	}
	return f.Sync()
}
