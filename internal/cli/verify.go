package cli

import (
	"context"
	"errors"
	"fmt"

	"github.com/spf13/cobra"

	"github.com/droverproject/drover/block"
	"github.com/droverproject/drover/image"
	"github.com/droverproject/drover/qcow2"
)

// maxBackups bounds the length of a chain of backups.
const maxBackups = 1000

// verifying is one run of verify.
type verifying struct {
	*app
	src               source
	manifest, against string
	output            string
	layers, quiet     bool
	progress          progressFlag
	results           []verifyResult
}

// verifyResult is the JSON of one check.
type verifyResult struct {
	Filename string `json:"filename"`
	Check    string `json:"check"` // "layer", "chain", "disk" or "against"
	OK       bool   `json:"ok"`
	Problem  string `json:"problem,omitempty"`
	Offset   *int64 `json:"offset,omitempty"` // of the first part of the disk that differs
}

func (a *app) verifyCommand() *cobra.Command {
	v := &verifying{app: a}
	cmd := &cobra.Command{
		Use:   "verify [flags] BACKUP",
		Short: "Check backups that 'drover export' has written",
		Long: `Check BACKUP and all backups that it stands on by their manifests: that each
holds what was written to it, that each stands on the one it was made for, and
that the chain as a whole is the disk as it was when BACKUP was made.

With --against the disk is compared with an image, too, or with a snapshot of one
(FILE@SNAPSHOT).

Exit codes: 0 fine, 1 something is not as it was, 2 something could not be read.`,
		Example: `  drover verify inc2.qcow2
  drover verify --against disk.qcow2@monday inc2.qcow2`,
		Args: oneImage,
		RunE: func(cmd *cobra.Command, args []string) error {
			if err := checkOutput(v.output); err != nil {
				return err
			}
			return v.run(cmd.Context(), args[0])
		},
	}
	v.src.add(cmd)
	f := cmd.Flags()
	f.StringVar(&v.manifest, "manifest", "", "the manifest of BACKUP is in `FILE` (BACKUP.json)")
	f.StringVar(&v.against, "against", "", "compare with the disk in `FILE` or FILE@SNAPSHOT, too")
	f.BoolVar(&v.layers, "layers", false, "check each file by itself, and not the disk as a whole")
	v.progress.apart = true
	addProgress(f, &v.progress)
	f.BoolVarP(&v.quiet, "quiet", "q", false, "print nothing but what is wrong")
	outputFlag(cmd, &v.output)
	v.src.policy.add(f)
	return cmd
}

func (v *verifying) run(ctx context.Context, name string) error {
	top, err := v.chain(ctx, name)
	if err != nil {
		return &exitError{exitNoOpen, err.Error()}
	}
	if !v.layers {
		if err := v.whole(ctx, name, name, "disk", top); err != nil {
			return &exitError{exitNoOpen, err.Error()}
		}
	}
	if v.against != "" {
		if err := v.whole(ctx, v.against, v.against, "against", top); err != nil {
			return &exitError{exitNoOpen, err.Error()}
		}
	}
	if v.output == "json" {
		if err := v.printJSON(v.results); err != nil {
			return err
		}
	}
	for _, r := range v.results {
		if !r.OK {
			return &exitError{code: exitDiffer}
		}
	}
	return nil
}

// chain checks every file by itself, from the top down, and returns the manifest of the first.
func (v *verifying) chain(ctx context.Context, name string) (top *image.Manifest, err error) {
	var above *image.Manifest
	manifest := v.manifest
	for range maxBackups {
		if manifest == "" {
			manifest = name + manifestSuffix
		}
		m, err := readManifest(manifest)
		if err != nil {
			return nil, errorf("Could not read the manifest of '%s': %w", name, err)
		}
		if above == nil {
			top = m
		} else if above.BaseSum != "" && above.BaseSum != m.Sum {
			v.note(name, "chain", &image.Mismatch{What: fmt.Sprintf("'%s' was made for another base", above.File)})
		}
		if err := v.layer(ctx, name, m); err != nil {
			return nil, err
		}
		if m.Base == "" {
			return top, nil
		}
		name, manifest, above = below(name, m.Base), "", m
	}
	return nil, errorf("'%s' stands on more than %d backups", name, maxBackups)
}

// layer checks one file, without what stands below it.
func (v *verifying) layer(ctx context.Context, name string, m *image.Manifest) (err error) {
	src := v.src
	if err := src.set(name); err != nil {
		return err
	}
	o := src.openOptions()
	o.NoBacking = true
	dev, err := block.Open(ctx, src.name, o)
	if err != nil {
		return openError(name, err)
	}
	defer func() { err = errors.Join(err, dev.Close()) }()
	im, ok := dev.(*qcow2.Image)
	if !ok {
		return errorf("'%s' is not a backup: its format is %s", name, dev.Info().Format)
	}
	if base, _ := im.BackingFile(); base != m.Base {
		v.note(name, "chain", &image.Mismatch{What: fmt.Sprintf("it stands on '%s', and was made for '%s'", base, m.Base)})
		return nil
	}
	return v.judge(name, "layer", image.VerifyLayer(ctx, dev, m))
}

// whole compares a disk with a manifest.
func (v *verifying) whole(ctx context.Context, name, arg, check string, m *image.Manifest) (err error) {
	src := v.src
	dev, err := v.openSide(ctx, &src, arg)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, dev.Close()) }()
	p := v.startProgress("verify", v.progress, v.quiet)
	err = image.VerifyDisk(ctx, dev, m, p.set)
	p.newline()
	return v.judge(name, check, err)
}

// judge notes the outcome of a check; other errors are returned.
func (v *verifying) judge(name, check string, err error) error {
	var m *image.Mismatch
	if err != nil && !errors.As(err, &m) {
		return errorf("Could not verify '%s': %w", name, err)
	}
	v.note(name, check, m)
	return nil
}

// note prints the outcome of a check.
func (v *verifying) note(name, check string, m *image.Mismatch) {
	r := verifyResult{Filename: name, Check: check, OK: m == nil}
	if m != nil {
		r.Problem = m.What
		if m.Len > 0 {
			r.Offset = &m.Off
		}
	}
	v.results = append(v.results, r)
	what := map[string]string{"disk": " (the whole disk)", "against": " (the image)"}[check]
	switch {
	case v.output == "json":
	case m != nil:
		v.printf("%s%s: FAILED: %s\n", name, what, m.Error())
	case !v.quiet:
		v.printf("%s%s: OK\n", name, what)
	}
}
