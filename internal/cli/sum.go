package cli

import (
	"bufio"
	"context"
	encoding "encoding/hex"
	"errors"
	"fmt"
	"os"
	"strings"

	"github.com/spf13/cobra"

	"github.com/droverproject/drover/image"
)

// summing is one run of sum.
type summing struct {
	*app
	src                 source
	algo, check, output string
	quiet               bool
	progress            progressFlag
}

func (a *app) sumCommand() *cobra.Command {
	s := &summing{app: a}
	cmd := &cobra.Command{
		Use:   "sum [flags] FILE...",
		Short: "Print a hash of the disk inside an image",
		Long: `Print a hash of what a guest reads from a disk. It does not depend on the format
of the image, its layers, its cluster size, or what is allocated.
` + sideHelp + `

Algorithms (--algo):
  sha256-1m    the default: hashes blocks of 1 MiB on all processors and skips
               what is not allocated. The hash is the SHA-256 of the text
               "drover sha256-1m" and a newline, the size of the disk as 8 bytes
               (the most significant first), and the SHA-256 of each block.
  sha256-flat  the SHA-256 of all bytes, which sha256sum prints for the raw disk.

With --check the lines that 'drover sum' has printed are read from LIST, and each
disk is compared with its line. Exit codes: 0 fine, 1 a disk has another hash or
could not be read.`,
		Example: `  drover sum disk.qcow2 disk.qcow2@before > LIST
  drover sum --check LIST
  drover sum --algo sha256-flat disk.qcow2`,
		RunE: func(cmd *cobra.Command, args []string) error {
			if err := checkOutput(s.output); err != nil {
				return err
			}
			if s.check != "" {
				if len(args) != 0 {
					return usagef("Expecting no image file names with --check")
				}
				return s.compare(cmd.Context())
			}
			if len(args) == 0 {
				return usagef("Expecting one or more image file names")
			}
			return s.run(cmd.Context(), args)
		},
	}
	s.src.add(cmd)
	f := cmd.Flags()
	f.StringVar(&s.algo, "algo", string(image.SumBlocks), "how to hash: sha256-1m or sha256-flat")
	f.StringVarP(&s.check, "check", "c", "", "compare disks with the hashes in `LIST`")
	s.progress.apart = true
	addProgress(f, &s.progress)
	f.BoolVarP(&s.quiet, "quiet", "q", false, "with --check, print nothing but what is wrong")
	outputFlag(cmd, &s.output)
	s.src.policy.add(f)
	return cmd
}

// sumResult is the JSON of one disk.
type sumResult struct {
	Filename  string `json:"filename"`
	Size      int64  `json:"virtual-size"`
	Algorithm string `json:"algorithm"`
	Sum       string `json:"sum"`
	OK        *bool  `json:"ok,omitempty"` // with --check
}

func (s *summing) run(ctx context.Context, names []string) error {
	list := []sumResult{}
	for _, name := range names {
		r, err := s.sum(ctx, name, s.algo)
		if err != nil {
			return err
		}
		if list = append(list, r); s.output != "json" {
			s.printf("%s:%s  %s\n", r.Algorithm, r.Sum, r.Filename)
		}
	}
	if s.output == "json" {
		return s.printJSON(list)
	}
	return nil
}

// sum hashes one disk.
func (s *summing) sum(ctx context.Context, name, algo string) (r sumResult, err error) {
	src := s.src
	dev, err := s.openSide(ctx, &src, name)
	if err != nil {
		return r, err
	}
	defer func() { err = errors.Join(err, dev.Close()) }()
	p := s.startProgress("sum", s.progress, false)
	sum, err := image.Sum(ctx, dev, image.SumOptions{Algorithm: image.SumAlgorithm(algo), Progress: p.set})
	if err != nil {
		p.newline()
		return r, errorf("Could not hash '%s': %w", name, err)
	}
	p.end()
	return sumResult{Filename: name, Size: dev.Size(), Algorithm: algo, Sum: encoding.EncodeToString(sum)}, nil
}

// compare hashes the disks of a list again.
func (s *summing) compare(ctx context.Context) (err error) {
	f, err := os.Open(s.check)
	if err != nil {
		return openError(s.check, err)
	}
	defer f.Close()
	list, bad := []sumResult{}, 0
	lines := bufio.NewScanner(f)
	for n := 1; lines.Scan(); n++ {
		if lines.Text() == "" {
			continue
		}
		want, err := parseSum(lines.Text())
		if err != nil {
			return errorf("%s, line %d: %w", s.check, n, err)
		}
		got, err := s.sum(ctx, want.Filename, want.Algorithm)
		if ctx.Err() != nil {
			return ctx.Err()
		}
		ok := err == nil && got.Sum == want.Sum
		got.Filename, got.Algorithm, got.OK = want.Filename, want.Algorithm, &ok
		list = append(list, got)
		if err != nil {
			s.tell(err)
		}
		if !ok {
			bad++
		}
		s.printCheck(got, err)
	}
	if err := lines.Err(); err != nil {
		return fmt.Errorf("reading %s: %w", s.check, err)
	}
	if s.output == "json" {
		if err := s.printJSON(list); err != nil {
			return err
		}
	}
	if bad > 0 {
		return errorf("%d of %d disks are not as they were", bad, len(list))
	}
	return nil
}

func (s *summing) printCheck(r sumResult, err error) {
	switch {
	case s.output == "json":
	case err != nil:
		s.printf("%s: FAILED to be read\n", r.Filename)
	case !*r.OK:
		s.printf("%s: FAILED\n", r.Filename)
	case !s.quiet:
		s.printf("%s: OK\n", r.Filename)
	}
}

// parseSum reads a line that sum has printed.
func parseSum(line string) (r sumResult, err error) {
	sum, name, found := strings.Cut(line, "  ")
	algo, digits, colon := strings.Cut(sum, ":")
	b, err := encoding.DecodeString(digits)
	if !found || !colon || err != nil || len(b) != 32 || name == "" {
		return r, errors.New("not a line of 'drover sum': expecting ALGORITHM:HASH  FILE")
	}
	return sumResult{Filename: name, Algorithm: algo, Sum: strings.ToLower(digits)}, nil
}
