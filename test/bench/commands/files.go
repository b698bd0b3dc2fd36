package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"

	"github.com/droverproject/drover/block"
	_ "github.com/droverproject/drover/qcow2" // registers the format
)

// Work over whole images is measured on a disk of 4 GiB that begins with real files, those of /usr, and is zeroes behind.
const (
	diskSize = 4 << 30
	mib      = 1 << 20
)

// fileBytes is how many bytes of files there are.
var fileBytes int64 = 1400 * mib

// fileScenarios run each command with the best flags that qemu-img has for it.
func fileScenarios() []scenario {
	best := []string{"-m", "16", "-W"}
	convert := func(args ...string) []string { return append([]string{"convert"}, args...) }
	stock := func(args ...string) []string { return append(append([]string{"convert"}, best...), args...) }
	both := func(name, image string, args ...string) scenario {
		return scenario{Name: name, Image: image, Args: args, ReadOnly: true, Needs: []string{"files.raw"}}
	}
	list := []scenario{
		both("convert qcow2 to raw", "files.qcow2", convert("-f", "qcow2", "-O", "raw", "IMAGE", "OUT")...),
		both("convert raw to qcow2", "files.raw", convert("-f", "raw", "-O", "qcow2", "IMAGE", "OUT")...),
		both("convert to zlib", "files.qcow2", convert("-f", "qcow2", "-O", "qcow2", "-c", "IMAGE", "OUT")...),
		both("convert to zstd", "files.qcow2", convert("-f", "qcow2", "-O", "qcow2", "-c", "-o", "compression_type=zstd", "IMAGE", "OUT")...),
		both("convert zstd to raw", "zstd.qcow2", convert("-f", "qcow2", "-O", "raw", "IMAGE", "OUT")...),
		both("convert zlib to raw", "zlib.qcow2", convert("-f", "qcow2", "-O", "raw", "IMAGE", "OUT")...),
	}
	for i := range list {
		list[i].Stock = stock(list[i].Args[1:]...)
	}
	return append(list,
		both("check of the files", "files.qcow2", "check", "IMAGE"),
		both("compare", "files.qcow2", "compare", "-f", "raw", "-F", "qcow2", "RAW", "IMAGE"),
		both("measure of the files", "files.qcow2", "measure", "-O", "qcow2", "IMAGE"),
		both("map of the files", "files.qcow2", "map", "--output=json", "IMAGE"),
		scenario{Name: "commit", Image: "overlay.qcow2", Args: []string{"commit", "-q", "IMAGE"}, Copies: []string{"files.qcow2"}},
		scenario{Name: "rebase", Image: "overlay.qcow2", Args: []string{"rebase", "-b", "other.qcow2", "-F", "qcow2", "IMAGE"},
			Copies: []string{"files.qcow2", "other.qcow2"}},
		scenario{Name: "measure, 1 TiB scattered", Image: "scattered.qcow2", Args: []string{"measure", "-O", "qcow2", "IMAGE"}, ReadOnly: true},
		scenario{Name: "map, 1 TiB scattered", Image: "scattered.qcow2", Args: []string{"map", "--output=json", "IMAGE"}, ReadOnly: true},
	)
}

// fileMakers returns what makes the images, those that they need of each other first.
func fileMakers() map[string]func(path string) error {
	return map[string]func(path string) error{
		"files.raw": makeFiles,
		"files.qcow2": from("files.raw", func(path, raw string) error {
			return command("qemu-img", "convert", "-f", "raw", "-O", "qcow2", raw, path)
		}),
		"zlib.qcow2": from("files.raw", func(path, raw string) error {
			return command("qemu-img", "convert", "-f", "raw", "-O", "qcow2", "-c", "-m", "16", raw, path)
		}),
		"zstd.qcow2": from("files.raw", func(path, raw string) error {
			return command("qemu-img", "convert", "-f", "raw", "-O", "qcow2", "-c", "-o", "compression_type=zstd", "-m", "16", raw, path)
		}),
		"overlay.qcow2": from("files.qcow2", func(path, _ string) error {
			if err := command("qemu-img", "create", "-q", "-f", "qcow2", "-b", "files.qcow2", "-F", "qcow2", path); err != nil {
				return err
			}
			return changeSome(path, 4)
		}),
		"other.qcow2": from("files.qcow2", func(path, base string) error {
			if err := command("cp", "--sparse=always", base, path); err != nil {
				return err
			}
			return changeSome(path, 10)
		}),
		"scattered.qcow2": makeScattered,
		"empty.qcow2":     func(path string) error { return command("qemu-img", "create", "-q", "-f", "qcow2", path, "1G") },
	}
}

// from makes a file when another one is there.
func from(name string, fn func(path, other string) error) func(path string) error {
	return func(path string) error {
		other := filepath.Join(filepath.Dir(path), name)
		if err := made(other); err != nil {
			return err
		}
		return fn(path, other)
	}
}

// made makes a master unless it is there.
func made(path string) error {
	if _, err := os.Stat(path); !errors.Is(err, os.ErrNotExist) {
		return err
	}
	fn := fileMakers()[filepath.Base(path)]
	if fn == nil {
		fn = makers[filepath.Base(path)]
	}
	if fn == nil {
		return fmt.Errorf("nobody knows how to make %s", path)
	}
	if err := fn(path); err != nil {
		return fmt.Errorf("making %s: %w", filepath.Base(path), err)
	}
	return nil
}

// makeFiles fills a raw disk with files of /usr.
func makeFiles(path string) error {
	f, err := os.Create(path)
	if err != nil {
		return err
	}
	defer f.Close()
	tar := exec.Command("tar", "-C", "/", "-cf", "-", "usr")
	out, err := tar.StdoutPipe()
	if err != nil {
		return err
	}
	if err := tar.Start(); err != nil {
		return err
	}
	_, err = io.CopyN(f, out, fileBytes)
	_ = out.Close() // tar need not write the rest
	_ = tar.Wait()
	if err != nil && !errors.Is(err, io.EOF) {
		return err
	}
	return f.Truncate(diskSize)
}

// changeSome changes a MiB in n of the files.
func changeSome(path string, n int64) error {
	ctx := context.Background()
	dev, err := block.Open(ctx, path, block.OpenOptions{Format: "qcow2", Policy: block.BelowImageFolder()})
	if err != nil {
		return err
	}
	buf := make([]byte, mib)
	for off := int64(0); off < fileBytes && err == nil; off += n * mib {
		if err = dev.ReadAt(ctx, buf, off); err == nil {
			for i := 0; i < len(buf); i += 512 {
				buf[i] ^= 0x55
			}
			err = dev.WriteAt(ctx, buf, off, 0)
		}
	}
	return errors.Join(err, dev.Close())
}

// makeScattered makes a disk of 1 TiB of which 200,000 clusters are allocated, here and there.
func makeScattered(path string) error {
	const size, clusters = 1 << 40, 200_000
	if err := command("qemu-img", "create", "-q", "-f", "qcow2", path, "1T"); err != nil {
		return err
	}
	ctx := context.Background()
	dev, err := block.Open(ctx, path, block.OpenOptions{Format: "qcow2"})
	if err != nil {
		return err
	}
	r := rand.New(rand.NewPCG(1, 2))
	word := []byte("somewhere")
	for i := 0; i < clusters && err == nil; i++ {
		err = dev.WriteAt(ctx, word, r.Int64N(size>>16)<<16, 0)
	}
	return errors.Join(err, dev.Close())
}
