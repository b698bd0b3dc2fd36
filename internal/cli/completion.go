package cli

import (
	"context"
	"slices"
	"strings"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"github.com/droverproject/drover/block"
	"github.com/droverproject/drover/qcow2"
)

func (a *app) completionCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "completion bash|zsh|fish|powershell",
		Short: "Print the script that completes command lines in a shell",
		Long: `Print the script with which a shell completes drover's command lines: commands,
flags and their values, the options of formats, and snapshots by their names.`,
		Example: `  drover completion bash > /etc/bash_completion.d/drover
  drover completion zsh > "${fpath[1]}/_drover"
  drover completion fish > ~/.config/fish/completions/drover.fish`,
		ValidArgs: []string{"bash", "zsh", "fish", "powershell"},
		RunE: func(cmd *cobra.Command, args []string) error {
			if len(args) != 1 {
				return usagef("Expecting the name of a shell")
			}
			root := cmd.Root()
			switch args[0] {
			case "bash":
				return root.GenBashCompletionV2(a.out, true)
			case "zsh":
				return root.GenZshCompletion(a.out)
			case "fish":
				return root.GenFishCompletion(a.out, true)
			case "powershell":
				return root.GenPowerShellCompletionWithDesc(a.out)
			}
			return usagef("Unknown shell '%s': expecting bash, zsh, fish or powershell", args[0])
		},
	}
	return cmd
}

// completeFlags tells cobra, for every command, what values its flags can have.
func (a *app) completeFlags(cmd *cobra.Command) {
	values := map[string][]string{
		"format": formatNames(), "second-format": formatNames(), "target-format": formatNames(), "output-format": formatNames(),
		"backing-format": formatNames(), "base-format": formatNames(),
		"cache": cacheModes, "source-cache": cacheModes, "output": {"human", "json"}, "preallocation": {"off", "metadata", "falloc", "full"},
		"repair": {"leaks", "all"}, "algo": {"sha256-1m", "sha256-flat"}, "aio": {"threads", "native", "io_uring"},
		"discard": {"ignore", "unmap"}, "detect-zeroes": {"off", "on", "unmap"},
	}
	set := func(f *pflag.Flag) {
		switch {
		case f.Value.Type() == "bool":
		case f.Name == "options":
			_ = cmd.RegisterFlagCompletionFunc(f.Name, completeOptions)
		case cmd.Name() == "snapshot" && slices.Contains([]string{"apply", "delete", "rename"}, f.Name), f.Name == "snapshot", f.Name == "load-snapshot":
			_ = cmd.RegisterFlagCompletionFunc(f.Name, completeSnapshots)
		case values[f.Name] != nil:
			_ = cmd.RegisterFlagCompletionFunc(f.Name, cobra.FixedCompletions(values[f.Name], cobra.ShellCompDirectiveNoFileComp))
		}
	}
	cmd.NonInheritedFlags().VisitAll(set)
	if slices.Contains([]string{"diff", "sum"}, cmd.Name()) {
		cmd.ValidArgsFunction = completeSides
	}
	for _, c := range cmd.Commands() {
		a.completeFlags(c)
	}
}

var cacheModes = []string{"none", "writeback", "writethrough", "directsync", "unsafe"}

func formatNames() []string { return block.Formats() }

// completeOptions completes the last of a list of options of the format to be made: that which the command line has, or qcow2.
func completeOptions(cmd *cobra.Command, _ []string, toComplete string) ([]string, cobra.ShellCompDirective) {
	format := "qcow2"
	for _, name := range []string{"output-format", "target-format", "format"} {
		if f := cmd.Flags().Lookup(name); f != nil && f.Changed {
			format = f.Value.String()
			break
		}
	}
	known := map[string][]createOption{"raw": rawOptions, "qcow2": qcow2Options}[format]
	before := ""
	if i := strings.LastIndexByte(toComplete, ','); i >= 0 {
		before = toComplete[:i+1]
	}
	var list []string
	for _, o := range known {
		if strings.HasPrefix(before+o.name, toComplete) {
			list = append(list, before+o.name+"=\t"+o.help)
		}
	}
	slices.Sort(list)
	return list, cobra.ShellCompDirectiveNoFileComp | cobra.ShellCompDirectiveNoSpace
}

// completeSnapshots offers the snapshots of the first image that the command line has so far.
func completeSnapshots(_ *cobra.Command, args []string, _ string) ([]string, cobra.ShellCompDirective) {
	for _, name := range args {
		if list := snapshotNames(name); list != nil {
			return list, cobra.ShellCompDirectiveNoFileComp
		}
	}
	return nil, cobra.ShellCompDirectiveNoFileComp
}

// completeSides completes FILE@SNAPSHOT once there is a FILE.
func completeSides(_ *cobra.Command, _ []string, toComplete string) ([]string, cobra.ShellCompDirective) {
	i := strings.LastIndexByte(toComplete, '@')
	if i <= 0 {
		return nil, cobra.ShellCompDirectiveDefault
	}
	var list []string
	for _, name := range snapshotNames(toComplete[:i]) {
		if full := toComplete[:i+1] + name; strings.HasPrefix(full, toComplete) {
			list = append(list, full)
		}
	}
	return list, cobra.ShellCompDirectiveNoFileComp
}

// snapshotNames reads the names of an image's snapshots. It waits for no lock, and what cannot be read has none.
func snapshotNames(name string) []string {
	file, err := block.OpenFile(name, block.OpenOptions{ReadOnly: true, ForceShare: true, Policy: block.BelowImageFolder()})
	if err != nil {
		return nil
	}
	defer file.Close()
	info, err := qcow2.ReadInfo(context.Background(), file)
	if err != nil {
		return nil
	}
	list := []string{}
	for _, s := range info.Snapshots {
		if s.Name != "" && strings.IndexFunc(s.Name, func(r rune) bool { return r < ' ' }) < 0 {
			list = append(list, s.Name)
		}
	}
	return list
}
